"""Tensors by name: one safetensors file, or a folder with a file of each rank.

A rank writes what it holds. Of a tensor that is cut over ranks that is a part, stored flat, and ``places`` in the
metadata of the file says where it begins and what shape the whole has. So no weights are sent, nobody holds a copy of
the whole, and no file is written by two machines; yet any number of ranks can read what any other has written.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
TYPES = {code: dtype for dtype, code in CODES.items()}

Part = tuple[int, Tensor]  # where it begins in the whole tensor, flat, in elements; and its values, flat


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its name, its size when it is whole, and ``part``, what this rank writes of it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    part: Callable[[], Part | None]

    @property
    def count(self) -> int:
        """How many elements it has."""
        return torch.Size(self.shape).numel()

    @property
    def size(self) -> int:
        """How many bytes it takes."""
        return self.dtype.itemsize * self.count


def file_of(folder: Path, rank: int, ranks: int) -> Path:
    """The file of a rank in a folder."""
    return folder / f"rank-{rank + 1:05d}-of-{ranks:05d}.safetensors"


def write(path: Path, entries: list[Entry], notes: dict[str, Any]) -> int:
    """Write this rank's parts of the entries, one at a time, and ``notes`` as JSON; return the bytes of the values.

    Raises RuntimeError for a part that lies outside its tensor, OSError where it cannot be written.
    Source: https://github.com/huggingface/safetensors, "Format": 8 bytes of length, a JSON header, the values.
    """
    header: dict[str, Any] = {}
    places: dict[str, Any] = {}
    end = 0
    for entry in entries:
        begin, values = entry.part() or (0, torch.empty(0))
        count, begins = values.numel(), end
        if not 0 <= begin <= begin + count <= entry.count:
            raise RuntimeError(f"{entry.name}: elements {begin} to {begin + count} of {entry.count}")
        if count or not entry.count:
            end += count * entry.dtype.itemsize
            shape = entry.shape if count == entry.count else (count,)
            header[entry.name] = {"dtype": CODES[entry.dtype], "shape": shape, "data_offsets": (begins, end)}
        if 0 < count < entry.count:
            places[entry.name] = (begin, entry.shape)
    header["__metadata__"] = {"notes": json.dumps(notes), "places": json.dumps(places)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the values begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            if entry.count and (part := entry.part()) is not None:
                file.write(part[1].detach().to("cpu", entry.dtype).contiguous().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())  # on the disk before it is renamed, and an older one is removed
    return end


def read_notes(path: Path) -> dict[str, Any]:
    """The notes of a file or folder.

    FileNotFoundError where a rank's file is missing, safetensors' own error where one is cut short; whether the parts
    make up their tensors is seen when these are read.
    """
    files = _files(path)
    if path.is_dir() and files[:1] != [file_of(path, 0, len(files))]:
        raise FileNotFoundError(f"{path} lacks files of ranks: there are {len(files)}")
    notes = []
    for each in files:
        with safe_open(each, "pt") as file:
            notes.append(file.metadata()["notes"])
    return dict(json.loads(notes[0]))


def read(path: Path, prefix: str) -> "Stored":
    """The tensors whose names begin with ``prefix``, by the rest of their names, on the CPU; each read when asked for.

    The files stay open while the mapping is held. Asking raises KeyError, and ValueError where a part is missing.
    """
    found: dict[str, list[Any]] = {}
    for each in _files(path):
        file = safe_open(each, "pt")
        places = json.loads(file.metadata().get("places", "{}"))
        for name in list(file.keys()):
            if name.startswith(prefix):
                found.setdefault(name.removeprefix(prefix), []).append((file, name, places.get(name)))
    return Stored(found)


class Stored(Mapping[str, Tensor]):
    """Tensors by name, of one file or of several that hold parts of them: (file, name there, place there) each."""

    def __init__(self, found: dict[str, list[Any]]) -> None:
        self.found = found

    def size(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and type of a tensor, whose values are not read."""
        file, key, place = self.found[name][0]
        held = file.get_slice(key)
        return tuple(place[1] if place else held.get_shape()), TYPES[held.get_dtype()]

    def part(self, name: str, begin: int, count: int) -> Tensor:
        """``count`` elements of a tensor, flat, or as many as it has from ``begin`` on; no others are read.

        They may be pages of the file, which would keep it on the disk when it is pruned: copy what you keep.
        """
        held = self._held(name, begin, count)
        return held[0] if len(held) == 1 else torch.cat(held)

    def __getitem__(self, name: str) -> Tensor:
        shape, _ = self.size(name)
        return torch.cat(self._held(name, 0, torch.Size(shape).numel())).view(shape)

    def _held(self, name: str, begin: int, count: int) -> list[Tensor]:
        """What each file has of these elements, in their order; at least one tensor, that may be empty."""
        shape, dtype = self.size(name)
        end = min(begin + count, torch.Size(shape).numel())
        found: dict[int, Tensor] = {}
        for file, key, place in self.found[name]:
            at = place[0] if place else 0
            first, last = max(begin, at), min(end, at + torch.Size(file.get_slice(key).get_shape()).numel())
            if first < last:
                found[first] = file.get_tensor(key).flatten()[first - at : last - at]
        held = [found[first] for first in sorted(found)] or [torch.empty(0, dtype=dtype)]
        if (seen := sum(map(len, held))) != max(0, end - begin):
            raise ValueError(f"{name}: {seen} of {end - begin} elements")
        return held

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)


def part_of_stored(values: Mapping[str, Tensor], name: str, begin: int, count: int) -> Tensor:
    """``Stored.part`` of any mapping."""
    if isinstance(values, Stored):
        return values.part(name, begin, count)
    return values[name].flatten()[begin : begin + count]


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("rank-*.safetensors")) if path.is_dir() else [path]
