"""Tensors that may be cut by rows (DTensors): the whole, this rank's part, what it writes; and a whole one, cut."""

from typing import Any

from torch import Tensor

from dreambooth.parallel.tensors import Part


def whole(value: Tensor) -> Tensor:
    """A tensor of which each rank may hold a part, whole."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value.detach()  # type: ignore[operator]


def local(value: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return value.to_local() if hasattr(value, "to_local") else value  # type: ignore[operator]


def part_of(value: Tensor, first: bool) -> Part | None:
    """What this rank writes of a tensor: the first one all of it; of one that is cut by rows, each what it holds.

    Where groups of ranks hold the same (fsdp_hybrid), only the first group writes. Raises NotImplementedError for other
    cuts.
    """
    if not hasattr(value, "device_mesh"):
        return (0, value.detach().flatten()) if first else None
    from torch.distributed.tensor import Replicate, Shard

    where = list(zip(value.placements, value.device_mesh.get_coordinate(), value.device_mesh.shape, strict=True))  # type: ignore[attr-defined]
    cuts = [(place, ranks) for kind, place, ranks in where if kind == Shard(0)]
    if len(cuts) != 1 or any(kind not in (Shard(0), Replicate()) for kind, *_ in where):
        raise NotImplementedError(f"a tensor that is cut as {value.placements}")  # type: ignore[attr-defined]
    if any(place for kind, place, _ in where if kind == Replicate()):
        return None
    place, ranks = cuts[0]
    rows = -(-value.shape[0] // ranks)  # as torch.chunk cuts: the last ranks may have less, or nothing
    begin = min(place * rows, value.shape[0])
    return begin * value.shape[1:].numel(), local(value).detach().flatten()


def like(value: Tensor, held: Any) -> Tensor:
    """A whole tensor, cut as ``held`` is, and on its device. Nothing is sent: every rank has it whole."""
    if not hasattr(held, "device_mesh"):
        return value.to(held.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(held.device), held.device_mesh, held.placements, src_data_rank=None)


def number(value: Tensor) -> float | int:
    """A number of the optimizer's state, as it was."""
    found = value.item()
    return int(found) if found == int(found) else found
