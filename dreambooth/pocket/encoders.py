"""The shipped networks that look at pictures: image-text model, ViT and judge, as safetensors in half precision."""

from pathlib import Path
from typing import TypeVar

import open_clip
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import CLIPTokenizer

from dreambooth.files import atomic
from dreambooth.pocket import ENCODERS, WEIGHTS, eye, imagetext, judge

Model = TypeVar("Model", bound=nn.Module)


def save(model: nn.Module, name: str, folder: Path = ENCODERS) -> None:
    """Write the weights of one network as ``<folder>/<name>.safetensors`` in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / f"{name}.safetensors") as path:
        save_file({key: value.half().contiguous() for key, value in model.state_dict().items()}, path)


def _filled(model: Model, name: str, folder: Path) -> Model:
    state = load_file(folder / f"{name}.safetensors")
    model.load_state_dict({key: value.to(torch.float32) for key, value in state.items()})
    return model.eval().requires_grad_(False)


def load_tokenizer(folder: Path = WEIGHTS) -> CLIPTokenizer:
    """The tokenizer that the pipeline and the image-text model share."""
    return CLIPTokenizer.from_pretrained(folder / "tokenizer")


def load_imagetext(folder: Path = ENCODERS) -> open_clip.CLIP:
    """The image-text model (open_clip), float32, frozen."""
    return _filled(imagetext.build(len(load_tokenizer())), "imagetext", folder)


def load_eye(folder: Path = ENCODERS) -> VisionTransformer:
    """The ViT that tells individuals apart, float32, frozen."""
    return _filled(eye.build(), "eye", folder)


def load_judge(folder: Path = ENCODERS) -> nn.Sequential:
    """The classifier of class, colour and context, float32, frozen."""
    return _filled(judge.build(), "judge", folder)
