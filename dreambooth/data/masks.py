"""Masks: how much each cell of a photo's latent counts in its loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import avg_pool2d

from dreambooth.data.views import Shape, View, framed, sides
from dreambooth.errors import UserError
from dreambooth.files import MASK, fault_of, open_picture, opened

KEY = "model.data.masks"
ALPHA, FILES = "alpha", "files"


@dataclass(frozen=True)
class Masks:
    """Where the masks of one folder's pictures come from (None: nowhere, all cells count alike).

    ``floor`` is the least weight before it is scaled, ``factor`` the pixels that a latent cell spans.
    """

    kind: str | None
    floor: float
    factor: int

    def weight(self, path: Path, view: View, shape: Shape) -> Tensor:
        """The weight of each latent cell (1, h, w) of a picture seen so, of mean 1.

        w = max(m, floor) / mean(max(m, floor)), with m the mask in [0, 1] averaged over the cell. So the mean over a
        picture of w times the error is the weighted mean of the error, and a mask of one value changes nothing. It is
        OneTrainer's masked training with ``normalize_masked_area_loss`` (modules/util/loss/masked_loss.py). A view
        that shows nothing of the mask, with a floor of 0, weighs nothing.
        """
        mask = self.open(path)
        if mask is None:
            width, height = sides(shape)
            return torch.ones(1, height // self.factor, width // self.factor)
        pixels = torch.from_numpy(framed(mask, view, shape) / 255)
        weight = avg_pool2d(pixels[None], self.factor).clamp(min=self.floor)
        return weight / weight.mean().clamp(min=1e-30)

    def open(self, path: Path) -> Image.Image | None:
        """The mask of a picture, upright, 8-bit grey, white where the subject is; None without masks."""
        if self.kind == FILES:
            return open_picture(mask_of(path)).convert("L")
        return _alpha(path) if self.kind == ALPHA else None

    def check(self, paths: Sequence[Path]) -> None:
        """Raise UserError unless each picture has a mask of its own size that is not black all over."""
        for path in paths if self.kind else ():
            name, mask = self._named(path), self.open(path)
            assert mask is not None
            size, own = mask.size, open_picture(path).size
            if size != own:
                raise UserError(
                    f"{KEY}: {name} has {size[0]}x{size[1]} pixels, {path.name} {own[0]}x{own[1]}; draw it anew"
                )
            if mask.getextrema()[1] == 0:
                raise UserError(f"{KEY}: {name} is empty; make white (or opaque) what shows the subject")

    def _named(self, path: Path) -> str:
        """What to call the mask of a picture; UserError when it has none."""
        if self.kind == FILES:
            fault = fault_of(mask_of(path))
            if fault:
                raise UserError(f"{KEY}={FILES}: {mask_of(path)} cannot be read ({fault}); draw it, or type {KEY}=null")
            return str(mask_of(path))
        with opened(path) as file:
            if not file.has_transparency_data:
                raise UserError(f"{KEY}={ALPHA}: {path} has no transparency; save it with some, or type {KEY}=null")
        return f"the transparency of {path}"


def mask_of(path: Path) -> Path:
    """The mask file of a picture."""
    return path.with_name(path.stem + MASK)


def mask_files(folder: Path, kind: str | None) -> set[str]:
    """The names of the masks that may lie in a folder of pictures."""
    return {path.name for path in folder.glob(f"*{MASK}")} if kind == FILES else set()


def _alpha(path: Path) -> Image.Image:
    with opened(path) as file:
        file.load()
        return ImageOps.exif_transpose(file).convert("RGBA").getchannel("A")
