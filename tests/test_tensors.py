"""Tensors written by all ranks together, in a format that others read."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from dreambooth import UserError
from dreambooth.parallel import checkpoint
from dreambooth.parallel.cuts import parts
from dreambooth.parallel.tensors import Entry, Part, begin, fill, read, read_notes

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

    def cut(value: torch.Tensor) -> list[Part]:
        first, last = (value.numel() * place // ranks for place in (rank, rank + 1))
        return [(first, value.flatten()[first:last])] if last > first else []

    return [Entry(name, tuple(value.shape), value.dtype, lambda v=value: cut(v)) for name, value in VALUES.items()]


def write(path: Path) -> None:
    begin(path, entries(), {"step": 3, "name": "é"})
    assert fill(path, entries()) == (SIZE, None)


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_others_read_what_all_ranks_wrote(tmp_path: Path, ranks: int) -> None:
    path = tmp_path / "some.ckpt"
    begin(path, entries(0, ranks), {"step": 3, "name": "é"})
    assert sum(fill(path, entries(rank, ranks))[0] for rank in reversed(range(ranks))) == SIZE
    assert read_notes(path) == {"step": 3, "name": "é"}
    found = load_file(path)
    assert found.keys() == VALUES.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in VALUES.items())
    stored = read(path, "b/")
    assert set(stored) == {"codes", "half", "nothing"}
    assert torch.equal(stored["codes"], VALUES["b/codes"])


def test_a_file_cut_short_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "some.ckpt"
    write(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Exception, match=r"(?i)incomplete|header"):
        read_notes(path)


def test_nothing_is_written_beside_its_place(tmp_path: Path) -> None:
    path = tmp_path / "some.ckpt"
    for start, values in ((0, torch.zeros(3)), (1, torch.zeros(2)), (-1, torch.zeros(1))):
        wrong = [Entry("a", (2,), torch.float32, lambda start=start, values=values: [(start, values)])]
        begin(path, wrong, {})
        with pytest.raises(RuntimeError, match="a: elements"):
            fill(path, wrong)


def test_who_cannot_write_goes_on_with_the_others(tmp_path: Path) -> None:
    """Some parts are put together by all ranks: whoever stopped at an error would leave them waiting."""
    asked = []
    own = [Entry(name, (1,), torch.float32, lambda name=name: asked.append(name) or []) for name in "ab"]
    written, failure = fill(tmp_path / "absent", own)
    assert (written, type(failure), asked) == (0, FileNotFoundError, ["a", "b"])


def test_a_rank_that_does_not_share_the_run_folder_says_so(tmp_path: Path) -> None:
    alone = SimpleNamespace(
        root_device="cpu", broadcast=lambda _: str(tmp_path / "elsewhere" / "some.tmp"), reduce=lambda count, **_: count
    )
    with pytest.raises(UserError, match=r"some\.ckpt: another rank began it.*share the run folder$"):
        checkpoint._write(alone, tmp_path / "some.ckpt", None, entries(), {})


@pytest.mark.parametrize(("shape", "placements"), [((4,), [Shard(0)]), ((2, 3), [Replicate(), Shard(0)])])
@pytest.mark.parametrize("size", [(7, 3), (3,), (8, 2, 2), (1, 5), (12,)])
def test_ranks_write_every_row_of_a_tensor_that_is_cut_once(shape, placements, size) -> None:
    value = torch.randn(size)
    found = torch.full((value.numel(),), float("nan"))
    ranks = torch.Size(shape).numel()
    for rank in range(ranks):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
        try:
            mesh = init_device_mesh("cpu", shape)
            held = distribute_tensor(value, mesh, placements, src_data_rank=None)
            for start, values in parts(held, rank == 0):
                assert found[start : start + len(values)].isnan().all()
                found[start : start + len(values)] = values
        finally:
            dist.destroy_process_group()
    assert torch.equal(found.view_as(value), value)


def test_the_first_rank_writes_what_all_have() -> None:
    value = torch.randn(2, 2)
    assert parts(value, first=False) == []
    [(start, values)] = parts(value, first=True)
    assert start == 0
    assert torch.equal(values, value.flatten())
