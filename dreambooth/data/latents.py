"""A cache of what frozen networks compute: VAE moments of pictures, embeddings of prompts; one .pt file for each.

A file is named by the hash of everything that changes its content and of nothing else, and holds that name inside.
One that is cut short or belongs elsewhere is made again; none is ever guessed to be right.
"""

import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dreambooth.data.views import Shape, View
from dreambooth.errors import UserError
from dreambooth.files import atomic, content_key, hash_tensors, sweep
from dreambooth.progress import progress_bar

log = logging.getLogger(__name__)

FORMAT = 2
Entry = dict[str, Tensor]


@dataclass(frozen=True)
class Item:
    """One cached thing: where it lies, the config key of that folder, its name, and how it is made."""

    folder: Path
    config_key: str
    key: str
    make: Callable[[], Entry]

    @property
    def path(self) -> Path:
        """The file of the item."""
        return self.folder / f"{self.key}.pt"

    def read(self) -> Entry | None:
        """The entry, or None when the file is absent, cut short, or another's."""
        try:
            stored = torch.load(self.path, map_location="cpu", weights_only=True)
            entry: Entry = stored["entry"]
            return entry if stored["key"] == self.key and stored["checksum"] == hash_tensors(entry) else None
        except Exception:  # a damaged archive raises whatever its bytes happen to provoke
            return None

    def write(self) -> None:
        """Make the entry and store it; UserError when the folder cannot be written."""
        entry = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.make().items()}
        memory = io.BytesIO()
        torch.save({"key": self.key, "checksum": hash_tensors(entry), "entry": entry}, memory)
        try:
            with atomic(self.path) as path:
                path.write_bytes(memory.getvalue())
        except UserError as error:
            raise UserError(f"{error}: {self.config_key}=...") from error


def moments_key(picture_hash: str, view: View, shape: Shape, vae: str) -> str:
    """The name of a picture's cached moments; ``vae`` is the fingerprint of the network that encodes it."""
    return content_key("moments", FORMAT, picture_hash, view.crop, view.flip, shape, vae, "float32")


def prompt_key(tokens: list[list[int]], text_encoder: str) -> str:
    """The name of a prompt's cached embeddings: what the tokenizer makes of it, and the fingerprint of who reads it."""
    return content_key("prompt", FORMAT, tokens, text_encoder, "float32")


def gather(
    items: list[Item],
    description: str,
    unit: str,
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> tuple[list[Entry], int]:
    """The entries of all items, in order, and how many were made. Each missing one is made by one rank, for all."""
    files = {item.path: item for item in items}
    entries = {path: item.read() for path, item in files.items()}
    missing = [path for path, entry in entries.items() if entry is None]
    spoiled = sum(path.exists() for path in missing)
    if spoiled:
        log.warning("cached %ss that were damaged or foreign, made again: %d", unit, spoiled)
    barrier()  # until here every rank has seen the same folder
    # By the place among all, not among the missing: another job may store one of them between two ranks' looks.
    own = [path for place, path in enumerate(files) if entries[path] is None and place % world == rank]
    with progress_bar(len(own), description, unit, rank) as bar:
        for path in own:
            files[path].write()
            bar.update()
    barrier()
    for path in missing:
        entries[path] = files[path].read()
    for folder in {path.parent for path in missing} if rank == 0 else ():
        sweep(folder)
    lost = [str(path) for path, entry in entries.items() if entry is None]
    if lost:
        raise UserError(f"{lost[0]} was written but cannot be read back; every rank must see the same folder")
    return [entry for item in items if (entry := entries[item.path]) is not None], len(missing)
