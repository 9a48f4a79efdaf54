"""Parameters in the flat pieces that ZeRO's stages 1 and 2 give each rank; where, their ``_hp_mapping`` says."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.parallel.tensors import Part, part_of_stored


def gather(weight: nn.Parameter, pieces: list[Tensor]) -> Tensor:
    """A parameter's values, whole, from flat pieces that lie as the masters do (stages 1 and 2)."""
    flat = torch.zeros(weight.numel(), device=weight.device)
    if weight._hp_mapping is not None:  # type: ignore[attr-defined]
        here, there = _places(weight, pieces)
        flat.narrow(*here).copy_(there)
    torch.distributed.all_reduce(flat)
    return flat.view_as(weight)


def part_in(weight: nn.Parameter, pieces: list[Tensor]) -> Part | None:
    """What this rank holds of a parameter, in flat pieces that lie as the masters do (stages 1 and 2)."""
    if weight._hp_mapping is None:  # type: ignore[attr-defined]
        return None
    (_, begin, _), values = _places(weight, pieces)
    return begin, values


def scatter(weight: nn.Parameter, values: Mapping[str, Tensor], name: str, pieces: list[Tensor]) -> None:
    """Write what this rank holds of the values of that name into flat pieces (stages 1 and 2); no more is read."""
    if weight._hp_mapping is not None:  # type: ignore[attr-defined]
        (_, begin, count), there = _places(weight, pieces)
        there.copy_(part_of_stored(values, name, begin, count))


def _places(weight: nn.Parameter, pieces: list[Tensor]) -> tuple[tuple[int, int, int], Tensor]:
    """Which part of a parameter this rank holds (dimension, start, length), and the part of a piece that it is."""
    found: Any = weight._hp_mapping  # type: ignore[attr-defined]
    here, there = found.lp_fragment_address, found.hp_fragment_address
    return (0, here.start, here.numel), pieces[found.param_group_index].narrow(0, there.start, there.numel)
