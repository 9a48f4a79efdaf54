"""Gate (c): the denoiser, on cached latents and on the embeddings of the frozen text tower."""

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextModel, CLIPTokenizer

from dreambooth.noise import generator, stratified
from dreambooth.objective import Diffusion
from dreambooth.pocket.autoencoder import CHANNELS, sample
from dreambooth.pocket.imagetext import WIDTH, tokenize
from dreambooth.pocket.scenes import Scenes
from dreambooth.pocket.stage import Stage
from dreambooth.progress import progress_bar
from dreambooth.weighting import min_snr


def build() -> UNet2DConditionModel:
    """16x8x8 latents, widths 64 and 128, cross-attention on both levels: 4.3 M parameters."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        layers_per_block=1,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's own noise schedule; ``clip_sample`` would cut the latents at 1 and wash the places out."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def scaling_factor(moments: Tensor) -> float:
    """What brings the latents to unit deviation, as Stable Diffusion's 0.18215 does."""
    mean, logvar = moments[:4000].float().chunk(2, dim=1)
    return 1 / (mean.var() + logvar.exp().mean()).sqrt().item()


class DenoiserStage(Stage):
    """v-prediction, min-SNR 5, stratified timesteps, one caption in ten dropped; what is kept is the average.

    Trains a new network, or under its own ``name`` goes on from the weights of ``start``.
    """

    def __init__(
        self,
        scenes: Scenes,
        moments: Tensor,
        scale: float,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        steps: int,
        seed: int,
        lr: float = 8e-4,
        batch: int = 64,
        variants: int = 6,
        name: str = "denoiser",
        start: UNet2DConditionModel | None = None,
    ):
        super().__init__(name, steps, lr, seed)
        self.model = build()
        if start is not None:
            self.model.load_state_dict(start.state_dict())
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
        self.average.requires_grad_(False)
        self.moments, self.scale, self.batch = moments, scale, batch
        self.objective = Diffusion.from_scheduler(scheduler())
        captions = [scenes.captions(variant) for variant in range(variants)]
        texts = ["", *sorted({c for row in captions for c in row})]
        numbers = {text: i for i, text in enumerate(texts)}
        self.captions = torch.tensor([[numbers[c] for c in row] for row in captions])
        with torch.no_grad():
            parts = [text_encoder(tokenize(tokenizer, texts[i : i + 250]))[0] for i in range(0, len(texts), 250)]
        self.embeddings = torch.cat(parts)

    def loss(self, g: torch.Generator) -> Tensor:
        index = torch.randint(len(self.moments), (self.batch,), generator=g)
        latents = self.scale * sample(self.moments[index], g)
        text = self.captions[torch.randint(len(self.captions), (self.batch,), generator=g), index]
        text[torch.rand(self.batch, generator=g) < 0.1] = 0
        noise = torch.randn(latents.shape, generator=g)
        t = self.objective.sample_t(stratified(self.batch, self.seed, self.global_step, "timestep"))
        noisy, target = self.objective.add_noise(latents, noise, t), self.objective.target(latents, noise, t)
        noisy, t, cond = noisy.to(self.device), t.to(self.device), self.embeddings[text].to(self.device)
        predicted = self.model(noisy, t, encoder_hidden_states=cond, return_dict=False)[0]
        return self.objective.loss(predicted, target.to(self.device), t, min_snr).mean()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.average.update_parameters(self.model)  # before the callbacks, one of which saves it


def pipeline(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """The parts as a Stable Diffusion pipeline."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def draw_prompts(
    pipe: StableDiffusionPipeline,
    prompts: list[str],
    seed: int | str,
    steps: int = 25,
    guidance: float = 5.0,
    batch: int = 54,
) -> Tensor:
    """One picture a prompt: float pixels (N, 3, 64, 64) in [-1, 1]; noise follows from (seed, place in the list)."""
    pipe.set_progress_bar_config(disable=True)
    parts = []
    with progress_bar(len(prompts), "drawing prompts", "picture") as bar:
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            generators = [generator(seed, start + i, "draw") for i in range(len(part))]
            options = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"}
            parts.append(pipe(part, generator=generators, **options).images)
            bar.update(len(part))
    return torch.cat(parts) * 2 - 1
