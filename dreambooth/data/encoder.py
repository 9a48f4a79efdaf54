"""What the frozen networks say of pictures and prompts, one at a time, from the cache where there is one."""

from collections.abc import Callable, Iterable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreambooth.data.latents import Entry, Item, gather, moments_key, prompt_key
from dreambooth.data.sources import Source
from dreambooth.data.views import Shape, View, pixels
from dreambooth.errors import UserError
from dreambooth.families.base import Family
from dreambooth.files import file_hash, hash_bytes


class Encoder:
    """Encodes the pictures and prompts of a source; networks come to ``device`` when something is missing.

    ``store`` says whether into the source's cache; ``shared`` is how the ranks share the work (``latents.gather``).
    ``found`` counts the latents that were asked for, ``made`` those of them that had to be encoded.
    """

    def __init__(
        self,
        family: Family,
        device: torch.device,
        store: bool,
        shared: dict[str, Any],
    ) -> None:
        self.family, self.device, self.store, self.shared = family, device, store, shared
        self.found = self.made = 0
        self.readers = [name for name in family.networks if name.startswith("text_encoder")]

    def pictures(
        self, source: Source, paths: list[Path], views: Callable[[str], list[View]], shape: Shape
    ) -> list[list[Tensor]]:
        """The moments (2C, h, w) of each picture's views in one shape.

        ``views`` gives as many for every picture, from the hash of its bytes.
        """
        vae = self.family.fingerprint("vae")
        items = []
        for path in paths:
            content = file_hash(path)
            for view in views(content):
                key = moments_key(content, view, shape, vae)
                make = partial(self.moments, source.key, path, content, view, shape)
                items.append(Item(source.cache, source.cache_key, key, make))
        entries, made = gather(items, f"encoding {source.role} pictures", "latent", **self.shared)
        moments = [entry["moments"] for entry in entries]
        each = len(items) // len(paths)
        self.found, self.made = self.found + len(items), self.made + made
        return [moments[first : first + each] for first in range(0, len(moments), each)]

    def moments(self, key: str, path: Path, content: str, view: View, shape: Shape) -> Entry:
        """Encode one picture, alone: the bits of a result depend on the size of its batch.

        Raises UserError where its hash is not ``content`` any more: it would be kept under the name of another.
        """
        data = path.read_bytes()
        if hash_bytes(data) != content:
            raise UserError(f"{key}: {path} was changed while it was read; type the same command again")
        self.family.move(self.device, "vae")
        with torch.no_grad():
            seen = pixels(BytesIO(data), view, shape).to(self.device)
            return {"moments": self.family.encode_pictures(seen[None])[0]}

    def prompts(self, source: Source, texts: Iterable[str]) -> dict[str, Entry]:
        """The embeddings (1, ...) of each distinct prompt."""
        distinct = list(dict.fromkeys(texts))
        if not self.store:
            return {text: self.embeddings(text) for text in distinct}
        reader = self.family.fingerprint(*self.readers)
        keys = [prompt_key(self.family.token_ids([text]).tolist(), reader) for text in distinct]
        items = [
            Item(source.cache, source.cache_key, key, partial(self.embeddings, text))
            for key, text in zip(keys, distinct, strict=True)
        ]
        entries, _ = gather(items, f"encoding {source.role} prompts", "prompt", **self.shared)
        return dict(zip(distinct, entries, strict=True))

    def embeddings(self, text: str) -> Entry:
        """Read one prompt, alone."""
        self.family.move(self.device, *self.readers)
        with torch.no_grad():
            return {name: value.cpu() for name, value in self.family.encode_prompts([text]).items()}
