"""Pictures from a diffusers pipeline: fixed batch shapes, a generator for each picture, and no trace left behind."""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import nn

from dreambooth.errors import UserError
from dreambooth.families.truncation import warn_of_pipeline_truncation
from dreambooth.noise import seed_of

SAMPLERS: dict[str, Any] = {
    "DDIM": diffusers.DDIMScheduler,
    "PLMS": diffusers.PNDMScheduler,
    "DPM": diffusers.DPMSolverMultistepScheduler,
    "EULER": diffusers.EulerDiscreteScheduler,
}
# Stable Diffusion's settings, for what a checkpoint's scheduler leaves unsaid: diffusers' own default clips x0 to
# [-1, 1], which washes latents out.
UNSAID = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "skip_prk_steps": True}


def scheduler_for(own: Any, sampler_type: str) -> Any:
    """A new scheduler of the named type with the noise levels and prediction type of the pipeline's ``own``."""
    if sampler_type == "PLMS" and own.config.get("rescale_betas_zero_snr"):
        raise UserError("sampler_type=PLMS cannot draw from noise levels of zero terminal SNR: type DDIM, DPM or EULER")
    return SAMPLERS[sampler_type].from_config(settings_of(own))


def zero_terminal_snr(own: Any) -> Any:
    """A scheduler like ``own`` with its noise levels stretched to end in pure noise, and drawing from that end.

    Lin et al. 2023 (https://arxiv.org/abs/2305.08891), sections 3.1 and 3.3. Of DDIM where its own class cannot.
    """
    able = "rescale_betas_zero_snr" in inspect.signature(type(own).__init__).parameters
    kind = type(own) if able else diffusers.DDIMScheduler
    return kind.from_config({**settings_of(own), "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"})


def settings_of(own: Any) -> dict[str, Any]:
    """What a checkpoint's scheduler says, and Stable Diffusion's settings for the rest."""
    unsaid = own.config.get("_use_default_values", [])
    said = {name: value for name, value in own.config.items() if name not in unsaid and name[0] != "_"}
    return {**UNSAID, **said}


def draw(
    pipeline: Any,
    prompts: list[str],
    seeds: list[int],
    *,
    steps: int,
    guidance: float,
    sampler_type: str,
    negative_prompt: str | None = None,
    guidance_rescale: float = 0.0,
    resolution: int,
) -> list[Image.Image]:
    """One batch of len(prompts) pictures, picture i a function of prompts[i], seeds[i] and the length of the batch.

    ``guidance_rescale`` is phi of Lin et al. 2023 (https://arxiv.org/abs/2305.08891), section 3.4: at 1 a guided
    prediction has the standard deviation of the prediction without guidance. The pipeline's networks come back in the
    modes they were in, and its scheduler is its own again.
    """
    warn_of_pipeline_truncation(pipeline, [*prompts, negative_prompt or ""])
    own = pipeline.scheduler
    pipeline.scheduler = scheduler_for(own, sampler_type)
    pipeline.set_progress_bar_config(disable=True)
    try:
        with torch.no_grad(), eval_mode(pipeline), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)  # DPM under numpy 2
            levels = pipeline(
                prompts,
                negative_prompt=[negative_prompt] * len(prompts) if negative_prompt else None,
                num_inference_steps=steps,
                guidance_scale=guidance,
                **({"guidance_rescale": guidance_rescale} if guidance_rescale else {}),  # not every pipeline has it
                height=resolution,
                width=resolution,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="np",
            ).images
    finally:
        pipeline.scheduler = own
    if not np.isfinite(levels).all():
        raise UserError("the model draws pictures that are not finite; try trainer.precision=32-true or other weights")
    return pipeline.numpy_to_pil(levels)


def picture_seed(seed: int, prompt: int, picture: int) -> int:
    """The seed of picture number ``picture`` of prompt number ``prompt``: any one can be drawn again by itself."""
    return seed_of(seed, prompt, picture, "picture")


@contextmanager
def eval_mode(pipeline: Any) -> Iterator[None]:
    """Put every network of a pipeline in evaluation, and each of its parts back in its own mode afterwards."""
    networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    modes = [(module, module.training) for network in networks for module in network.modules()]
    try:
        for network in networks:
            network.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
