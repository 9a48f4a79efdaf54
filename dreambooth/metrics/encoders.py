"""Real encoders by name, from open_clip, timm and torchmetrics. Weights are read safely: safetensors or weights_only.

An encoder has a ``name``, which is printed with every result, and turns PIL pictures of any size into what its scores
are computed from. A name without a path is looked up in the hub's cache, and downloaded where a network is at hand.
"""

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import open_clip
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor, nn
from torchmetrics.functional.image.lpips import _LPIPS
from torchvision import transforms

from dreambooth import hub
from dreambooth.errors import UserError

BATCH = 16
Backbone = Literal["alex", "vgg", "squeeze"]  # of LPIPS
log = logging.getLogger(__name__)


def in_batches(model: nn.Module, function: Callable[[Tensor], Tensor], rows: Sequence[Tensor]) -> Tensor:
    """``function`` over stacked ``rows``, 16 at a time, on the device of ``model`` and back, without gradients."""
    device = next(model.parameters()).device
    batches = (torch.stack(list(rows[i : i + BATCH])) for i in range(0, len(rows), BATCH))
    with torch.no_grad():
        return torch.cat([function(batch.to(device)).cpu() for batch in batches])


class OpenClip:
    """An image-text model of open_clip with its own preprocessing (for ViT-B-16: bicubic 224, centre crop).

    MindONE's DreamBooth scores CLIP-T and CLIP-I with ViT-B/16 of OpenAI; the paper does not say which CLIP it used.
    ``pretrained`` is a tag of open_clip's list or the path of a weights file.
    """

    def __init__(self, model: str = "ViT-B-16-quickgelu", pretrained: str = "openai"):
        self.name = f"open_clip {model} {Path(pretrained).name}"
        key = "metrics.encoders.clip.pretrained"
        self.model, _, self.transform = _found(
            lambda: open_clip.create_model_and_transforms(model, pretrained=pretrained, weights_only=True),
            f"{key}={pretrained}",
            key,
            published=not Path(pretrained).exists(),
        )
        self.model.eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(model)

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit features (N, D) of N pictures."""
        rows = [self.transform(picture.convert("RGB")) for picture in pictures]
        return in_batches(self.model, lambda batch: self.model.encode_image(batch, normalize=True), rows)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit features (N, D) of N prompts; what exceeds 77 tokens is not read."""
        with torch.no_grad():
            tokens = self.tokenizer(list(prompts)).to(next(self.model.parameters()).device)
            return self.model.encode_text(tokens, normalize=True).cpu()


class TimmViT:
    """A Vision Transformer of timm: class token, unit length.

    The default is the paper's DINO v1 ViT-S/16 (arXiv 2104.14294) with the preprocessing of its evaluation: Resize 256
    bicubic, CenterCrop 224, ImageNet's mean and deviation. ``checkpoint_path`` names a local weights file instead.
    """

    def __init__(self, model: str = "vit_small_patch16_224.dino", checkpoint_path: str | None = None):
        self.name = f"timm {model}" + (f" {Path(checkpoint_path).name}" if checkpoint_path else "")
        key = "metrics.encoders.dino.checkpoint_path"
        what = f"{key}={checkpoint_path} ({model})"
        self.model = _found(
            lambda: timm.create_model(model, num_classes=0, pretrained=not checkpoint_path),
            what if checkpoint_path else f"metrics.encoders.dino.model={model}",
            key,
            published=not checkpoint_path,
        )
        if checkpoint_path:  # not through timm, which would unpickle the file
            _found(lambda: self.model.load_state_dict(read_weights(checkpoint_path)), what, key)
        self.model.eval().requires_grad_(False)
        config = timm.data.resolve_data_config(model=self.model)
        self.transform = transforms.Compose(
            [
                transforms.Resize(256, transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(224),
                transforms.ToTensor(),
                transforms.Normalize(config["mean"], config["std"]),
            ]
        )

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit features (N, D) of N pictures."""
        rows = [self.transform(picture.convert("RGB")) for picture in pictures]
        return in_batches(self.model, lambda batch: F.normalize(self.model(batch), dim=-1), rows)


def lpips(net: Backbone = "alex", backbone_path: str | None = None) -> "Lpips | None":
    """LPIPS, or None (DIV is then null) while nobody has said where its backbone lies."""
    if backbone_path is None:
        log.info("div is left out: metrics.encoders.lpips.backbone_path names no weights of torchvision's %s", net)
        return None
    return Lpips(net, backbone_path)


class Lpips:
    """LPIPS (arXiv 1801.03924) of torchmetrics between pictures, brought to ``side`` x ``side`` pixels.

    The learned heads come with torchmetrics; the backbone's weights are a local file of torchvision's (``alex``: the
    authors' choice for comparing pictures, ``vgg`` or ``squeeze``), such as alexnet-owt-7be5be79.pth. The paper does
    not say which backbone its DIV used.
    """

    def __init__(self, net: Backbone, backbone_path: str, side: int = 256):
        self.name, key = f"LPIPS {net}", "metrics.encoders.lpips.backbone_path"
        self.model = _LPIPS(pretrained=True, net=net, pnet_rand=True).eval().requires_grad_(False)
        _fill(self.model.net, _found(lambda: read_weights(backbone_path), f"{key}={backbone_path}", key))
        bicubic = transforms.InterpolationMode.BICUBIC
        self.transform = transforms.Compose([transforms.Resize((side, side), bicubic), transforms.ToTensor()])

    def distances(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Distances (N, N) between N pictures, 0 on the diagonal."""
        device = next(self.model.parameters()).device
        pixels = torch.stack([self.transform(picture.convert("RGB")) * 2 - 1 for picture in pictures]).to(device)
        table = torch.zeros(len(pictures), len(pictures))
        with torch.no_grad():
            for i in range(1, len(pictures)):
                for others in torch.arange(i).split(BATCH):
                    same = pixels[i : i + 1].expand(len(others), -1, -1, -1)
                    table[i, others] = self.model(same, pixels[others]).flatten().cpu()
        return table + table.T


def _fill(backbone: nn.Module, state: dict[str, Tensor]) -> None:
    """Torchvision numbers a network's layers through, torchmetrics keeps the same numbers inside slices.

    ``slice1.0.weight`` or, of SqueezeNet, ``slices.0.0.weight`` is ``features.0.weight``.
    """
    own = backbone.state_dict()
    layers = {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")}
    found = {name: layers.get(re.sub(r"^slices?\.?\d+\.", "", name)) for name in own}
    if any(value is None or value.shape != own[name].shape for name, value in found.items()):
        raise UserError("metrics.encoders.lpips.backbone_path: the file holds another network; name the one of net=")
    backbone.load_state_dict(found)


def _found(load: Callable[[], Any], what: str, key: str, published: bool = False) -> Any:
    """The loaded thing, or one line that says what is missing and which key to set.

    What is ``published`` is looked for in the hub's cache first, and then, if it answers at all, at the hub.
    """
    try:
        with hub.silent():
            if not published:
                return load()
            try:
                with hub.cache_only():
                    return load()
            except Exception as error:
                if not hub.not_cached(error):
                    raise
            if not hub.reachable():
                raise UserError(
                    f"{what} is not in the hub's cache, and the hub does not answer: set {key} to a local file"
                )
            return load()
    except UserError:
        raise
    except Exception as error:  # each library raises what it likes for a missing name, file or network
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise UserError(f"{what} cannot be loaded ({reason}); set {key} to a local file") from error


def read_weights(path: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a torch file without unpickling anything else."""
    return load_file(path) if path.endswith(".safetensors") else torch.load(path, weights_only=True)


def pixels_of(pictures: Sequence[Image.Image], side: int) -> list[Tensor]:
    """Each picture as (3, side, side) float pixels in [-1, 1]; other sizes are cropped and resampled, bicubic."""
    same = [p if p.size == (side, side) else ImageOps.fit(p, (side, side), Image.Resampling.BICUBIC) for p in pictures]
    return [torch.from_numpy(np.array(p.convert("RGB"))).permute(2, 0, 1) / 127.5 - 1 for p in same]
