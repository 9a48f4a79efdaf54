"""From a photo to the pixels the network sees: resize, crop, flip."""

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dreambooth.files import open_picture


@dataclass(frozen=True)
class View:
    """One way to look at a picture: where the crop lies, as fractions of the free room (x, y), and whether mirrored."""

    crop: tuple[float, float] = (0.5, 0.5)
    flip: bool = False


def draw_view(generator: torch.Generator, center_crop: bool, random_flip: bool) -> View:
    """A crop and flip from one generator; what is not random is centred and unflipped."""
    x, y, coin = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    return View((0.5, 0.5) if center_crop else (x, y), random_flip and coin < 0.5)


def pixels(path: Path | BinaryIO, view: View, resolution: int) -> Tensor:
    """A picture as (3, resolution, resolution) in [-1, 1].

    The short side is resized to ``resolution`` by PIL's bilinear filter, which antialiases, then the square is cropped,
    as diffusers' ``train_dreambooth.py`` does.
    """
    image = open_picture(path)
    short = min(image.size)
    if short != resolution:
        size = [int(resolution * side / short) for side in image.size]
        image = image.resize((max(size[0], resolution), max(size[1], resolution)), Image.Resampling.BILINEAR)
    left, top = (round((side - resolution) * at) for side, at in zip(image.size, view.crop, strict=True))
    values = np.array(image.crop((left, top, left + resolution, top + resolution)), dtype=np.float32)
    square = torch.from_numpy(values / 127.5 - 1).permute(2, 0, 1)
    return (square.flip(2) if view.flip else square).contiguous()
