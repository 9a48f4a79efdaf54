"""Which pictures make which batch: a function of the seed, the step and the position in the global batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from dreambooth.data.views import draw_view, pixels
from dreambooth.noise import generator


@dataclass(frozen=True)
class Role:
    """The instance or the regularization pictures, with what is known of them in advance."""

    name: str
    prompt: str
    paths: list[Path]
    moments: list[list[Tensor]] | None  # a list of variants (2C, h, w) for each picture; None: encoded online
    cond: dict[str, Tensor] | None  # the prompt's embeddings, (1, ...) each; None: the text encoder learns


@lru_cache(maxsize=64)
def order(count: int, seed: int, epoch: int, role: str) -> tuple[int, ...]:
    """The order of ``count`` pictures in one of their epochs."""
    return tuple(torch.randperm(count, generator=generator(seed, epoch, role, "order")).tolist())


def picture_at(place: int, count: int, seed: int, role: str) -> int:
    """The picture at a place of the endless stream that goes through all pictures, epoch by epoch, in new orders."""
    epoch, rest = divmod(place, count)
    return order(count, seed, epoch, role)[rest]


@dataclass(eq=False)
class Stream(IterableDataset):
    """Endless micro-batches of one rank from a given optimizer step on.

    Micro-batch ``j`` of rank ``r`` holds the positions ``(j * world + r) * b ...`` of the instance half of the global
    batch of G = b * world * accumulate pictures, then the same positions, offset by G, of the regularization half.
    """

    roles: list[Role]
    micro_batch_size: int
    seed: int
    resolution: int
    center_crop: bool
    random_flip: bool
    rank: int = 0
    world: int = 1
    accumulate: int = 1
    first_step: int = 0

    @property
    def global_size(self) -> int:
        """How many pictures of each role an optimizer step sees."""
        return self.micro_batch_size * self.world * self.accumulate

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        while True:
            step, micro = divmod(number, self.accumulate)
            yield self.batch(self.first_step + step, micro)
            number += stride

    def batch(self, step: int, micro: int) -> dict[str, Any]:
        """Micro-batch ``micro`` of one optimizer step; B = micro_batch_size * number of roles.

        step, global_size: int; index: B positions in the global batch; is_prior (B,) bool; prompts, paths: B strings;
        moments (B, 2C, h, w) or pixels (B, 3, H, W) in [-1, 1]; cond: (B, ...) each, absent if text is encoded online.
        """
        first = (micro * self.world + self.rank) * self.micro_batch_size
        chosen = [
            (role, number * self.global_size + position, self.picture(role, step, position))
            for number, role in enumerate(self.roles)
            for position in range(first, first + self.micro_batch_size)
        ]
        batch: dict[str, Any] = {
            "step": step,
            "index": [index for _, index, _ in chosen],
            "global_size": self.global_size,
            "is_prior": torch.tensor([index >= self.global_size for _, index, _ in chosen]),
            "prompts": [role.prompt for role, _, _ in chosen],
            "paths": [str(role.paths[picture]) for role, _, picture in chosen],
        }
        inputs = [self.look(role, step, index, picture) for role, index, picture in chosen]
        batch["pixels" if self.roles[0].moments is None else "moments"] = torch.stack(inputs)
        conds = [role.cond for role, _, _ in chosen if role.cond is not None]
        if conds:
            batch["cond"] = {name: torch.cat([cond[name] for cond in conds]) for name in conds[0]}
        return batch

    def picture(self, role: Role, step: int, position: int) -> int:
        """Which picture of a role stands at a position of the global batch."""
        return picture_at(step * self.global_size + position, len(role.paths), self.seed, role.name)

    def look(self, role: Role, step: int, index: int, picture: int) -> Tensor:
        """One cached variant of a picture, or its pixels under a fresh crop and flip."""
        if role.moments is None:
            view = draw_view(generator(self.seed, step, index, "view"), self.center_crop, self.random_flip)
            return pixels(role.paths[picture], view, self.resolution)
        variants = role.moments[picture]
        choice = torch.randint(len(variants), (), generator=generator(self.seed, step, index, "variant"))
        return variants[int(choice)]
