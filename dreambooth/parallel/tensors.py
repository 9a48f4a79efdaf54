"""Tensors by name in one safetensors file, written one at a time, so that nobody holds them all."""

import json
import os
from collections.abc import Callable, Iterable
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


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its name and size, and ``read``, which all ranks call together, for its values."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def write(path: Path, entries: list[Entry], notes: dict[str, Any]) -> None:
    """Write the entries in their order, and ``notes`` as JSON, in the safetensors format.

    Source: https://github.com/huggingface/safetensors, "Format": 8 bytes of length, a JSON header, the values.
    """
    header: dict[str, Any] = {"__metadata__": {"notes": json.dumps(notes)}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.dtype.itemsize * torch.Size(entry.shape).numel()
        header[entry.name] = {"dtype": CODES[entry.dtype], "shape": entry.shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the values begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            value = entry.read().detach().to("cpu", entry.dtype).contiguous()
            if tuple(value.shape) != entry.shape:
                raise RuntimeError(f"{entry.name} is {tuple(value.shape)}, announced as {entry.shape}")
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())  # on the disk before it is renamed, and an older one is removed


def take_part(entries: Iterable[Entry]) -> None:
    """What the ranks that do not write do meanwhile."""
    for entry in entries:
        entry.read()


def read_notes(path: Path) -> dict[str, Any]:
    """The notes of a file; it is whole, or an error says what is wrong with it."""
    with safe_open(path, "pt") as file:
        return dict(json.loads(file.metadata()["notes"]))


def read(path: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, by the rest of their names."""
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (it is no dict)
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}
