"""From a photo to the pixels the network sees: resize, crop, flip."""

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dreambooth.files import open_picture

Shape = int | tuple[int, int]  # a square's side, or width and height, in pixels


@dataclass(frozen=True)
class View:
    """One way to look at a picture: where the crop lies, as fractions of the free room (x, y), and whether mirrored."""

    crop: tuple[float, float] = (0.5, 0.5)
    flip: bool = False


def draw_view(generator: torch.Generator, center_crop: bool, random_flip: bool) -> View:
    """A crop and flip from one generator; what is not random is centred and unflipped."""
    x, y, coin = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    return View((0.5, 0.5) if center_crop else (x, y), random_flip and coin < 0.5)


def sides(shape: Shape) -> tuple[int, int]:
    """Width and height."""
    return (shape, shape) if isinstance(shape, int) else shape


def pixels(path: Path | BinaryIO, view: View, shape: Shape) -> Tensor:
    """A picture as (3, height, width) in [-1, 1]."""
    values = framed(open_picture(path), view, shape)
    return torch.from_numpy(values / 127.5 - 1).permute(2, 0, 1).contiguous()


def framed(image: Image.Image, view: View, shape: Shape) -> np.ndarray:
    """What a view shows of an image: float32 (height, width), and (…, 3) of a coloured one, in [0, 255].

    The image is resized by PIL's bilinear filter, which antialiases, until it just covers the shape, and what stands
    over is cropped, as diffusers' ``train_dreambooth.py`` does for squares.
    """
    width, height = sides(shape)
    narrow = image.width * height <= image.height * width
    side, wanted = (image.width, width) if narrow else (image.height, height)
    if side != wanted:
        size = [int(wanted * own / side) for own in image.size]
        image = image.resize((max(size[0], width), max(size[1], height)), Image.Resampling.BILINEAR)
    left, top = round((image.width - width) * view.crop[0]), round((image.height - height) * view.crop[1])
    part = image.crop((left, top, left + width, top + height))
    return np.array(ImageOps.mirror(part) if view.flip else part, dtype=np.float32)
