"""Stable Diffusion 1.x and 2.x."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from dreambooth.families import folder as folders
from dreambooth.families.base import Family
from dreambooth.families.truncation import warn_of_truncation

CLASSES = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}


class StableDiffusion(Family):
    """UNet, VAE and CLIP text encoder of a StableDiffusionPipeline, in float32 (Rombach et al. 2022).

    Args:
        from_pretrained: a local folder, a hub id, or ``pocket`` for the model in this package.
        revision: branch, tag or commit of a hub id.
        variant: which weight files to prefer; a folder that holds only one kind needs no word about it.

    Raises:
        UserError: no such folder, another kind of pipeline, pickled or damaged weights.
    """

    def __init__(self, from_pretrained: str, revision: str | None = None, variant: str | None = None):
        self.source = str(from_pretrained)
        self.folder = folders.locate(self.source, revision, variant)
        folders.check(self.folder, "StableDiffusionPipeline", {**CLASSES, "tokenizer": CLIPTokenizer})
        self.unet, self.vae, self.text_encoder = (
            folders.load(self.folder / name, kind, variant) for name, kind in CLASSES.items()
        )
        super().__init__({"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder})
        self.tokenizer = folders.load_tokenizer(self.folder / "tokenizer", CLIPTokenizer)
        self.vocabulary = len(self.tokenizer)  # without what a tuning adds
        self.scheduler = folders.load_scheduler(self.folder)
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.window = min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)

    @property
    def size_multiple(self) -> int:
        return self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    @property
    def default_resolution(self) -> int:
        return self.unet.config.sample_size * self.vae_scale_factor

    @torch.no_grad()
    def encode_pictures(self, pixels: Tensor) -> Tensor:
        posterior = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1).float()

    def sample_latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        mean, logvar = moments.chunk(2, dim=1)
        return (mean + (logvar / 2).exp() * noise) * self.vae.config.scaling_factor

    def token_ids(self, prompts: list[str]) -> Tensor:
        with folders.quiet():  # as the pipeline does it: a learned word of several embeddings is as many tokens
            prompts = TextualInversionLoaderMixin().maybe_convert_prompt(list(prompts), self.tokenizer)
        warn_of_truncation(self.tokenizer, self.window, prompts)
        return self.tokenizer(
            prompts, padding="max_length", max_length=self.window, truncation=True, return_tensors="pt"
        ).input_ids

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"prompt_embeds": self.text_encoder(self.token_ids(prompts).to(self.text_encoder.device))[0]}

    def denoise(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.unet(x_t, t, encoder_hidden_states=cond["prompt_embeds"]).sample

    def trainable_networks(self) -> dict[str, nn.Module]:
        return {"unet": self.unet, "text_encoder": self.text_encoder}

    def to_pipeline(self) -> DiffusionPipeline:
        pipeline: Any = StableDiffusionPipeline(
            **self.networks,
            tokenizer=self.tokenizer,
            scheduler=type(self.scheduler).from_config(self.scheduler.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        grown = {"tokenizer": self.tokenizer} if len(self.tokenizer) > self.vocabulary else {}
        folders.export(self.folder, self.networks, self.scheduler, folder, dtype, grown)
