"""Who draws the pictures of the classes, and how."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from dreambooth.data import checks, regularization
from dreambooth.data.sources import Source
from dreambooth.errors import about
from dreambooth.families.base import Family
from dreambooth.families.folder import locate, read_json
from dreambooth.hub import INDEX


@dataclass(frozen=True)
class Drawing:
    """The keys of the tree that say how regularization pictures are drawn; ``family`` is still untouched."""

    family: Family
    restore_from_path: str | None
    sampler: dict[str, Any]
    resolution: int
    seed: int
    num_reg_images: int
    num_images_per_prompt: int

    def inspect(self, source: Source) -> None:
        """Raise UserError when pictures of a class cannot be read, were drawn otherwise, or cannot be drawn."""
        own, drawn, _ = regularization.inspect(source.folder, self.settings(source))
        if not regularization.plan(own, drawn, self.num_reg_images):
            return  # a set that is complete may lie where nobody can write
        checks.writable(source.folder, source.key)
        if not self.draws_itself:
            with about(f"model.restore_from_path={self.restore_from_path}"):
                read_json(locate(str(self.restore_from_path)) / INDEX)

    def fill(self, sources: Sequence[Source], device: torch.device, shared: dict[str, Any]) -> int:
        """Draw the missing pictures of all classes, with one pipeline; how many all ranks drew."""
        drawer = cache(partial(self.drawer, device))
        pipeline = cache(lambda: drawer().to_pipeline())
        fingerprint = None if self.draws_itself else lambda: drawer().fingerprint()
        count, shared = self.num_reg_images, {**shared, "fingerprint": fingerprint}
        return sum(regularization.fill(pipeline, each.folder, count, self.settings(each), **shared) for each in sources)

    def settings(self, source: Source) -> dict[str, Any]:
        """What the pictures of a class depend on, as their manifest holds it."""
        return {
            "base": self.family.fingerprint() if self.draws_itself else str(self.restore_from_path),
            "prompt": source.prompt,
            **self.sampler,
            "resolution": self.resolution,
            "seed": self.seed,
            "num_images_per_prompt": self.num_images_per_prompt,
        }

    @property
    def draws_itself(self) -> bool:
        """Whether the family draws, rather than another model."""
        return self.restore_from_path in (None, self.family.source)

    def drawer(self, device: torch.device) -> Family:
        """The family, or the model that ``restore_from_path`` names, on the device."""
        with about(f"model.restore_from_path={self.restore_from_path}"):
            family = self.family if self.draws_itself else type(self.family)(self.restore_from_path)  # type: ignore
        family.move(device)
        return family
