"""Which pictures make which batch: a function of the seed, the step and the position in the global batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from dreambooth.data.masks import Masks
from dreambooth.data.views import Shape, draw_view, pixels
from dreambooth.noise import generator


@dataclass(frozen=True)
class Role:
    """The instance or the regularization pictures of a subject, with what is known of them in advance."""

    name: str  # what the order of the pictures is drawn by
    prompts: list[str]  # of each picture
    paths: list[Path]
    moments: list[list[Tensor]] | None  # a list of variants (2C, h, w) for each picture; None: encoded online
    conds: dict[str, dict[str, Tensor]] | None  # each prompt's embeddings, (1, ...) each; None: the text encoder learns
    weights: list[list[Tensor]] | None = None  # of the latent cells of each variant, (1, h, w); None: no masks
    masks: Masks | None = None  # the same, for what is encoded online


@dataclass(frozen=True)
class Bucket:
    """What is learned from in one shape: for each subject the roles of its pictures.

    ``turns`` says how often the bucket has its turn among all, which is how many photos have this shape.
    """

    shape: Shape
    subjects: list[list[Role]]
    turns: int = 1


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
    Each optimizer step has one bucket. The subjects take turns at the positions, in the regularization half too. With
    probability ``caption_dropout`` a record has the empty prompt.
    """

    buckets: list[Bucket]
    micro_batch_size: int
    seed: int
    center_crop: bool
    random_flip: bool
    caption_dropout: float = 0.0
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
        moments (B, 2C, h, w) or pixels (B, 3, H, W) in [-1, 1]; mask (B, 1, h, w) of mean 1 where there are masks;
        cond: (B, ...) each, absent if text is encoded online.
        """
        bucket, turn = self.bucket(step)
        first = (micro * self.world + self.rank) * self.micro_batch_size
        chosen = [
            (role, half * self.global_size + position, picture)
            for half in range(len(bucket.subjects[0]))
            for position in range(first, first + self.micro_batch_size)
            for role, picture in [self.picture(bucket.subjects, half, turn * self.global_size + position)]
        ]
        prompts = [self.prompt(role, step, index, picture) for role, index, picture in chosen]
        batch: dict[str, Any] = {
            "step": step,
            "index": [index for _, index, _ in chosen],
            "global_size": self.global_size,
            "is_prior": torch.tensor([index >= self.global_size for _, index, _ in chosen]),
            "prompts": prompts,
            "paths": [str(role.paths[picture]) for role, _, picture in chosen],
        }
        looks = [self.look(role, bucket.shape, step, index, picture) for role, index, picture in chosen]
        batch |= {name: torch.stack([look[name] for look in looks]) for name in looks[0]}
        conds = [role.conds[prompt] for (role, _, _), prompt in zip(chosen, prompts, strict=True) if role.conds]
        if conds:
            batch["cond"] = {name: torch.cat([cond[name] for cond in conds]) for name in conds[0]}
        return batch

    def bucket(self, step: int) -> tuple[Bucket, int]:
        """The bucket of a step, and how many steps before it had the same one.

        As many steps in a row as there are photos are an epoch, in which each bucket has its turns, in a new order.
        """
        turns = [bucket for bucket in self.buckets for _ in range(bucket.turns)]
        epoch, rest = divmod(step, len(turns))
        drawn = [turns[place] for place in order(len(turns), self.seed, epoch, "bucket")[: rest + 1]]
        return drawn[-1], epoch * drawn[-1].turns + sum(bucket is drawn[-1] for bucket in drawn[:-1])

    def picture(self, subjects: list[list[Role]], half: int, place: int) -> tuple[Role, int]:
        """Which picture, of which subject's role, stands at a place of the endless stream of a bucket.

        A role that several subjects share goes through its pictures as often as they all have their turn.
        """
        turn, subject = divmod(place, len(subjects))
        role = subjects[subject][half]
        sharing = [number for number, roles in enumerate(subjects) if roles[half] is role]
        seen = turn * len(sharing) + sharing.index(subject)
        return role, picture_at(seen, len(role.paths), self.seed, role.name)

    def prompt(self, role: Role, step: int, index: int, picture: int) -> str:
        """The prompt of a picture, or the empty one."""
        if self.caption_dropout:
            chance = torch.rand((), generator=generator(self.seed, step, index, "caption"))
            if chance < self.caption_dropout:
                return ""
        return role.prompts[picture]

    def look(self, role: Role, shape: Shape, step: int, index: int, picture: int) -> dict[str, Tensor]:
        """One cached variant of a picture, or its pixels under a fresh crop and flip; with its mask, if it has one."""
        if role.moments is None:
            path = role.paths[picture]
            view = draw_view(generator(self.seed, step, index, "view"), self.center_crop, self.random_flip)
            seen = {"pixels": pixels(path, view, shape)}
            return seen if role.masks is None else {**seen, "mask": role.masks.weight(path, view, shape)}
        variants = role.moments[picture]
        choice = int(torch.randint(len(variants), (), generator=generator(self.seed, step, index, "variant")))
        seen = {"moments": variants[choice]}
        return seen if role.weights is None else {**seen, "mask": role.weights[picture][choice]}
