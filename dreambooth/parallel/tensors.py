"""Tensors by name in one safetensors file, which all ranks write together: each its parts, where they belong.

Nothing is sent between ranks and nobody holds a whole tensor, as in a folder with a file of each rank; but any number
of ranks can read the one file that comes of it, and so can any program that knows the format.
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

Part = tuple[int, Tensor]  # where it begins in the whole tensor, in elements, and its values, flat


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its name and size when it is whole, and ``parts``, those of it that this rank writes.

    All ranks call ``parts`` in the same order, as some of them have to be put together first.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Callable[[], list[Part]]

    @property
    def count(self) -> int:
        """How many elements it has."""
        return torch.Size(self.shape).numel()

    @property
    def size(self) -> int:
        """How many bytes it takes."""
        return self.dtype.itemsize * self.count


def begin(path: Path, entries: list[Entry], notes: dict[str, Any]) -> None:
    """Write the head of a file, with ``notes`` as JSON, and leave room for the entries; one rank does.

    Source: https://github.com/huggingface/safetensors, "Format": 8 bytes of length, a JSON header, the values.
    """
    header: dict[str, Any] = {"__metadata__": {"notes": json.dumps(notes)}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.size
        header[entry.name] = {"dtype": CODES[entry.dtype], "shape": entry.shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the values begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + end)
        os.fsync(file.fileno())  # other machines see its size before they write


def fill(path: Path, entries: list[Entry]) -> tuple[int, OSError | None]:
    """Write this rank's parts; all ranks do, after ``begin``. How many bytes they were, and what kept it from the rest.

    An error is no reason to leave the others alone with the parts that all ranks put together.
    """
    try:
        file = path.open("r+b", buffering=0)
    except OSError as error:
        for entry in entries:
            entry.parts()
        return 0, error
    with file:
        return _fill(file, entries)


def _fill(file: Any, entries: list[Entry]) -> tuple[int, OSError | None]:
    written, failure = 0, None
    place = 8 + int.from_bytes(file.read(8), "little")
    for entry in entries:
        for start, values in entry.parts():
            if start < 0 or start + values.numel() > entry.count:
                raise RuntimeError(f"{entry.name}: elements {start} to {start + values.numel()} of {entry.count}")
            try:
                written += 0 if failure else _put(file, place + start * entry.dtype.itemsize, values, entry.dtype)
            except OSError as error:
                failure = error
        place += entry.size
    try:
        os.fsync(file.fileno())  # on the disk before it is renamed, and an older one is removed
    except OSError as error:
        failure = failure or error
    return written, failure


def _put(file: Any, place: int, values: Tensor, dtype: torch.dtype) -> int:
    """Write values at a place of a file, and return how many bytes they are."""
    data = values.detach().to("cpu", dtype).contiguous().view(torch.uint8).numpy().data if values.numel() else b""
    done = 0
    while done < len(data):  # a single call writes 2 GiB at most
        done += os.pwrite(file.fileno(), data[done:], place + done)
    return done


class _Stored(Mapping[str, Tensor]):
    def __init__(self, file: Any, names: dict[str, str]) -> None:
        self.file, self.names = file, names

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self.file.get_tensor(self.names[name])
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def read_notes(path: Path) -> dict[str, Any]:
    """The notes of a file; it is whole, or an error says what is wrong with it."""
    with safe_open(path, "pt") as file:
        return dict(json.loads(file.metadata()["notes"]))


def read(path: Path, prefix: str) -> Mapping[str, Tensor]:
    """The tensors whose names begin with ``prefix``, by the rest of their names; each is read when it is asked for."""
    file = safe_open(path, "pt")
    return _Stored(file, {name.removeprefix(prefix): name for name in list(file.keys()) if name.startswith(prefix)})
