"""The drawn training set of the pocket base, cached as one array so that no stage draws a scene twice."""

import os
from functools import cached_property
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dreambooth.noise import seed_of
from dreambooth.pocket.backgrounds import CONTEXTS
from dreambooth.pocket.figures import CLASSES
from dreambooth.pocket.world import COLOURS, PLAIN, SIZE, Odds, Scene, draw, random_scene
from dreambooth.progress import progress_bar

NOUNS, HUES, PLACES = tuple(CLASSES), tuple(COLOURS), tuple(CONTEXTS)


def tensor_of(image: Image.Image) -> Tensor:
    """A PIL picture as (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_float(pixels: Tensor) -> Tensor:
    """uint8 [0, 255] to float [-1, 1]."""
    return pixels.float() / 127.5 - 1


class Scenes:
    """``count`` random scenes of one seed: pixels (N, 3, 64, 64) uint8, captions, and what is in them."""

    def __init__(self, count: int, seed: int | str, folder: Path | None = None, odds: Odds = PLAIN):
        self.scenes: list[Scene] = [random_scene(Random(seed_of(seed, i, "scene")), odds) for i in range(count)]
        self.seed = seed
        self._folder = folder

    def __len__(self) -> int:
        return len(self.scenes)

    @cached_property
    def pixels(self) -> Tensor:
        """(N, 3, 64, 64) uint8."""
        if self._folder is None:
            return self._draw()
        path = self._folder / f"scenes-{self.seed}-{len(self)}.npy"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp.npy")
            np.save(temporary, self._draw().numpy())
            temporary.rename(path)
        return torch.from_numpy(np.load(path))

    def _draw(self) -> Tensor:
        pixels = torch.empty(len(self), 3, SIZE, SIZE, dtype=torch.uint8)
        with progress_bar(len(self), "drawing scenes", "scene") as bar:
            for i, scene in enumerate(self.scenes):
                pixels[i] = tensor_of(draw(scene))
                bar.update()
        return pixels

    @cached_property
    def labels(self) -> Tensor:
        """(N, 3) class, colour and context; colour is -1 where the palette has no name for it."""
        rows = [
            (NOUNS.index(s.figure.noun), HUES.index(s.colour) if s.colour else -1, PLACES.index(s.context))
            for s in self.scenes
        ]
        return torch.tensor(rows)

    def captions(self, variant: int = 0) -> list[str]:
        """One caption a scene; another ``variant`` names other attributes of the same scenes."""
        return [s.caption(Random(seed_of(self.seed, i, variant, "caption"))) for i, s in enumerate(self.scenes)]
