"""Folders laid out as Stable Diffusion 1.4, 1.5, 2.0-base and 2.1 are published, with random weights.

``tests/fixtures`` holds their public component configs. Structure, file names and weight names are the published ones;
widths are divided by the factors below unless the full size is asked for, and so is the number of attention heads
where it is given per level (2.x), so that heads stay whole. Depth, vocabulary, pictures and schedules are untouched.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel

from tests.tiny import write_tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
WIDTHS = ("hidden_size", "intermediate_size", "cross_attention_dim", "block_out_channels", "projection_dim")
UNET_FACTOR, VAE_FACTOR, TEXT_FACTOR = 10, 4, 8
LEGACY_VAE = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def build_published(folder: Path, model: str, variant: str | None = None, full_size: bool = False) -> Path:
    """Write ``model`` (a folder of fixtures); with ``variant`` the weights are float16 and only under that name."""
    shutil.copytree(FIXTURES / model, folder)
    configs = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/config.json")}
    if not full_size:
        for name, config in configs.items():
            scale(config, {"unet": UNET_FACTOR, "vae": VAE_FACTOR}.get(name, TEXT_FACTOR))
            (folder / name / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder / "tokenizer")
    shutil.copytree(FIXTURES / model / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    for name, config in configs.items():
        weights = published_weights(name, config)
        stem = "diffusion_pytorch_model" if name in ("unet", "vae") else "model"
        if variant:
            weights = {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
            stem = f"{stem}.{variant}"
        save_file(weights, folder / name / f"{stem}.safetensors", {"format": "pt"})
    return folder


def scale(config: dict[str, Any], factor: int) -> None:
    """Divide the widths of a config, in place; the text width that the UNet attends to goes with the text encoder."""
    for key, value in config.items():
        if isinstance(value, dict):
            scale(value, factor)
        elif key in WIDTHS:
            by = TEXT_FACTOR if key == "cross_attention_dim" else factor
            config[key] = [width // by for width in value] if isinstance(value, list) else value // by
        elif key == "attention_head_dim" and isinstance(value, list):
            config[key] = [max(1, heads // factor) for heads in value]


def published_weights(name: str, config: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights of a component, under the names of its published file."""
    with torch.device("meta"):
        network = network_of(name, config)
    g = torch.Generator().manual_seed(0)
    weights = {key: torch.randn(value.shape, generator=g) * 0.05 for key, value in network.state_dict().items()}
    for key, value in weights.items():
        if "norm" in key and key.endswith("weight"):
            value.fill_(1)
    positions = torch.arange(config.get("max_position_embeddings", 257))[None]
    if name == "text_encoder":
        weights = {f"text_model.{key}": value for key, value in weights.items()}
        return weights | {"text_model.embeddings.position_ids": positions}
    if name == "safety_checker":
        weights = {key.replace("vision_model.", "vision_model.vision_model.", 1): v for key, v in weights.items()}
        weights["concept_embeds_weights"] = torch.ones(17)  # a cosine above 1: nothing is ever found unsafe
        weights["special_care_embeds_weights"] = torch.ones(3)
        return weights | {"vision_model.vision_model.embeddings.position_ids": positions}
    if name == "vae":
        for new, old in LEGACY_VAE.items():
            weights = {key.replace(new, old): value for key, value in weights.items()}
    return weights


def network_of(name: str, config: dict[str, Any]) -> nn.Module:
    """The network that a component's config describes."""
    if name == "text_encoder":
        return CLIPTextModel(CLIPTextConfig.from_dict(config))
    if name == "safety_checker":
        return StableDiffusionSafetyChecker(CLIPConfig.from_dict(config))
    kind = UNet2DConditionModel if name == "unet" else AutoencoderKL
    return kind.from_config(config)
