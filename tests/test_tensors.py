"""Tensors written one at a time, in a format that others read."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dreambooth.parallel.tensors import Entry, read, read_notes, write

VALUES = {
    "a/weight": torch.randn(3, 5),
    "a/count": torch.tensor(7.0, dtype=torch.float64),
    "b/codes": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
    "b/half": torch.randn(4).to(torch.bfloat16),
    "b/nothing": torch.zeros(0, 2),
}


def entries() -> list[Entry]:
    return [Entry(name, tuple(value.shape), value.dtype, lambda v=value: v) for name, value in VALUES.items()]


def test_others_read_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "some.ckpt"
    write(path, entries(), {"step": 3, "name": "é"})
    assert read_notes(path) == {"step": 3, "name": "é"}
    found = load_file(path)
    assert found.keys() == VALUES.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in VALUES.items())
    assert read(path, "b/").keys() == {"codes", "half", "nothing"}


def test_a_file_cut_short_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "some.ckpt"
    write(path, entries(), {})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Exception, match=r"(?i)incomplete|header"):
        read_notes(path)


def test_what_was_announced_is_what_is_written(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="announced"):
        write(tmp_path / "some.ckpt", [Entry("a", (2,), torch.float32, lambda: torch.zeros(3))], {})
