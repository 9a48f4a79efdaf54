"""Tensors that ranks write each by itself, in a format that others read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from dreambooth import UserError
from dreambooth.parallel import checkpoint
from dreambooth.parallel.parts import part_of
from dreambooth.parallel.tensors import Entry, Part, file_of, part_of_stored, read, read_notes, write

VALUES = {
    "a/weight": torch.randn(3, 5),
    "a/count": torch.tensor(7.0, dtype=torch.float64),
    "b/codes": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
    "b/half": torch.randn(4).to(torch.bfloat16),
    "b/nothing": torch.zeros(0, 2),
}
SIZE = 3 * 5 * 4 + 8 + 6 + 4 * 2


def entries(rank: int = 0, ranks: int = 1) -> list[Entry]:
    """What one of some ranks writes of the values: the elements from its share of the way on."""

    def cut(value: torch.Tensor) -> Part | None:
        first, last = (value.numel() * place // ranks for place in (rank, rank + 1))
        return (first, value.flatten()[first:last]) if last > first or not (value.numel() or rank) else None

    return [Entry(name, tuple(value.shape), value.dtype, lambda v=value: cut(v)) for name, value in VALUES.items()]


def test_others_read_a_file_that_one_rank_wrote(tmp_path: Path) -> None:
    path = tmp_path / "some.ckpt"
    assert write(path, entries(), {"step": 3, "name": "é"}) == SIZE
    assert read_notes(path) == {"step": 3, "name": "é"}
    found = load_file(path)
    assert found.keys() == VALUES.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in VALUES.items())
    assert set(read(path, "b/")) == {"codes", "half", "nothing"}


@pytest.mark.parametrize("ranks", [1, 2, 5, 20])
def test_a_folder_of_parts_is_read_as_a_whole(tmp_path: Path, ranks: int) -> None:
    size = sum(write(file_of(tmp_path, rank, ranks), entries(rank, ranks), {"rank": rank}) for rank in range(ranks))
    assert size == SIZE
    assert read_notes(tmp_path) == {"rank": 0}
    found = read(tmp_path, "")
    assert set(found) == set(VALUES)
    for name, value in VALUES.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize(("begin", "count"), [(0, 15), (4, 7), (5, 0), (12, 9), (15, 4), (20, 4)])
def test_a_part_is_read_from_whatever_files_hold_it(tmp_path: Path, ranks: int, begin: int, count: int) -> None:
    for rank in range(ranks):
        write(file_of(tmp_path, rank, ranks), entries(rank, ranks), {})
    found = read(tmp_path, "")
    assert found.size("a/weight") == ((3, 5), torch.float32)
    expected = VALUES["a/weight"].flatten()[begin : begin + count]
    assert torch.equal(found.part("a/weight", begin, count), expected)
    assert torch.equal(part_of_stored(found, "a/weight", begin, count), expected)
    assert torch.equal(part_of_stored(VALUES, "a/weight", begin, count), expected)


def test_a_file_cut_short_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "some.ckpt"
    write(path, entries(), {})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Exception, match=r"(?i)incomplete|header"):
        read_notes(path)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_folder_without_one_of_its_files_is_no_checkpoint(tmp_path: Path, lost: int) -> None:
    for rank in range(3):
        write(file_of(tmp_path, rank, 3), entries(rank, 3), {})
    file_of(tmp_path, lost, 3).unlink()
    with pytest.raises(FileNotFoundError, match="lacks files of ranks: there are 2"):
        read_notes(tmp_path)
    with pytest.raises(ValueError, match="weight: 10 of 15 elements"):
        read(tmp_path, "a/")["weight"]


def test_a_tensor_with_a_hole_is_not_read(tmp_path: Path) -> None:
    write(file_of(tmp_path, 0, 1), [Entry("weight", (3,), torch.float32, lambda: (1, torch.ones(2)))], {})
    with pytest.raises(ValueError, match="weight: 2 of 3 elements"):
        read(tmp_path, "")["weight"]


@pytest.mark.parametrize(("begin", "count"), [(0, 3), (1, 2), (-1, 1)])
def test_no_part_reaches_out_of_its_tensor(tmp_path: Path, begin: int, count: int) -> None:
    with pytest.raises(RuntimeError, match="a: elements"):
        write(tmp_path / "some", [Entry("a", (2,), torch.float32, lambda: (begin, torch.zeros(count)))], {})


def test_what_was_read_outlives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "some.ckpt"
    write(path, entries(), {})
    value = read(path, "a/")["weight"]
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(value, VALUES["a/weight"])


def test_what_others_wrote_is_read(tmp_path: Path) -> None:
    save_file({"a/weight": VALUES["a/weight"]}, tmp_path / "some.ckpt", {"notes": "{}"})
    assert torch.equal(read(tmp_path / "some.ckpt", "a/")["weight"], VALUES["a/weight"])


def test_a_rank_that_does_not_share_the_run_folder_says_so(tmp_path: Path) -> None:
    strategy = SimpleNamespace(
        broadcast=lambda _: str(tmp_path / "elsewhere" / "some.tmp"), reduce_boolean_decision=lambda decision: decision
    )
    rank = SimpleNamespace(strategy=strategy, global_rank=1, world_size=2)
    layout = SimpleNamespace(sharded=True, entries=entries)
    with pytest.raises(UserError, match=r"some\.ckpt: its folder is not here.*does not share it$"):
        checkpoint._write(rank, tmp_path / "some.ckpt", None, layout, {})


@pytest.mark.parametrize(("shape", "placements"), [((4,), [Shard(0)]), ((2, 3), [Replicate(), Shard(0)])])
@pytest.mark.parametrize("size", [(7, 3), (3,), (8, 2, 2), (1, 5), (12,)])
def test_ranks_write_every_row_of_a_tensor_that_is_cut_once(shape, placements, size) -> None:
    value = torch.randn(size)
    found = torch.full((value.numel(),), float("nan"))
    ranks = torch.Size(shape).numel()
    for rank in range(ranks):
        with rank_of(rank, ranks):
            mesh = init_device_mesh("cpu", shape)
            held = distribute_tensor(value, mesh, placements, src_data_rank=None)
            begin, values = part_of(held, rank == 0) or (0, [])
        assert all(found[begin : begin + len(values)].isnan())
        found[begin : begin + len(values)] = torch.as_tensor(values)
    assert torch.equal(found.view_as(value), value)


def test_a_tensor_that_is_cut_by_columns_is_refused() -> None:
    with rank_of(0, 2):
        held = distribute_tensor(torch.ones(2, 4), init_device_mesh("cpu", (2,)), [Shard(1)], src_data_rank=None)
        with pytest.raises(NotImplementedError, match="Shard"):
            part_of(held, first=True)


@contextmanager
def rank_of(rank: int, ranks: int) -> Iterator[None]:
    """This process as one of some that are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_the_first_rank_writes_what_all_have() -> None:
    value = torch.randn(2, 2)
    assert part_of(value, first=False) is None
    begin, values = part_of(value, first=True)
    assert begin == 0
    assert torch.equal(values, value.flatten())
