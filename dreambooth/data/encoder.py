"""What the frozen networks say of pictures and prompts, one at a time, from the cache where there is one."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreambooth.data.latents import Entry, Item, gather, moments_key, prompt_key
from dreambooth.data.views import View, pixels
from dreambooth.families.base import Family
from dreambooth.files import file_hash


class Encoder:
    """Encodes for each role into its cache; networks come to ``device`` when something is missing.

    ``caches`` has a folder and its config key for each role, or nothing when nothing is stored; ``shared`` is how the
    ranks share the work (``latents.gather``).
    """

    def __init__(
        self,
        family: Family,
        device: torch.device,
        resolution: int,
        caches: dict[str, tuple[Path, str]],
        shared: dict[str, Any],
    ) -> None:
        self.family, self.device, self.resolution = family, device, resolution
        self.caches, self.shared = caches, shared
        self.readers = [name for name in family.networks if name.startswith("text_encoder")]

    def pictures(
        self, role: str, paths: list[Path], views: Callable[[str], list[View]]
    ) -> tuple[list[list[Tensor]], int]:
        """The moments (2C, h, w) of each picture's views, and how many had to be made.

        ``views`` gives as many for every picture, from the hash of its bytes.
        """
        vae = self.family.fingerprint("vae")
        items = []
        for path in paths:
            content = file_hash(path)
            for view in views(content):
                key = moments_key(content, view, self.resolution, vae)
                items.append(Item(*self.caches[role], key, partial(self.moments, path, view)))
        entries, made = gather(items, f"encoding {role} pictures", "latent", **self.shared)
        moments = [entry["moments"] for entry in entries]
        each = len(items) // len(paths)
        return [moments[first : first + each] for first in range(0, len(moments), each)], made

    def moments(self, path: Path, view: View) -> Entry:
        """Encode one picture, alone: the bits of a result depend on the size of its batch."""
        self.family.move(self.device, "vae")
        with torch.no_grad():
            square = pixels(path, view, self.resolution).to(self.device)
            return {"moments": self.family.encode_pictures(square[None])[0]}

    def prompt(self, role: str, text: str) -> Entry:
        """The embeddings (1, ...) of a prompt."""
        if role not in self.caches:
            return self.embeddings(text)
        key = prompt_key(self.family.tokens([text]).tolist(), self.family.fingerprint(*self.readers))
        item = Item(*self.caches[role], key, partial(self.embeddings, text))
        return gather([item], f"encoding the {role} prompt", "prompt", **self.shared)[0][0]

    def embeddings(self, text: str) -> Entry:
        """Read one prompt, alone."""
        self.family.move(self.device, *self.readers)
        with torch.no_grad():
            return {name: value.cpu() for name, value in self.family.encode_prompts([text]).items()}
