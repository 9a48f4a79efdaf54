"""The batches made of pictures that are streamed from tar shards, or of some of these and some from a folder."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from dreambooth.data.pairs import picture_at
from dreambooth.data.readers import Reader
from dreambooth.data.shards import Picture
from dreambooth.data.views import draw_view, pixels
from dreambooth.errors import UserError
from dreambooth.noise import generator

log = logging.getLogger(__name__)

Record = tuple[str, str, Path | BinaryIO]  # where it comes from, its prompt, and its file
Conds = dict[str, dict[str, Tensor]] | None  # each prompt's embeddings, (1, ...) each; None: every step reads prompts


@dataclass(frozen=True)
class FolderRole:
    """A role whose pictures lie in a folder: in the same order as without shards."""

    name: str
    prompts: list[str]  # of each picture
    paths: list[Path]
    conds: Conds

    def open(self, seed: int, number: int, readers: int, skip: int) -> Callable[[int], Record]:
        """The record at a place of the endless stream, which any reader can say."""

        def record(place: int) -> Record:
            picture = picture_at(place, len(self.paths), seed, self.name)
            return str(self.paths[picture]), self.prompts[picture], self.paths[picture]

        return record


@dataclass(frozen=True)
class ShardRole:
    """A role whose pictures are streamed; a picture's own caption is its prompt, where every step reads prompts."""

    name: str
    prompt: str
    shards: list[str]
    shuffle: int
    conds: Conds

    def open(self, seed: int, number: int, readers: int, skip: int) -> Callable[[int], Record]:
        """The next record of one reader, whatever the place."""
        reader = Reader(self.shards, self.name, seed, self.shuffle, number, readers)
        start, found = time.perf_counter(), reader.stream(skip)
        if skip:
            found = _announced(found, reader, skip, start)

        def record(place: int) -> Record:
            picture = next(found)
            own = picture.caption if self.conds is None else None
            return picture.place, own or self.prompt, picture.file

        return record


def _announced(found: Iterator[Picture], reader: Reader, skip: int, start: float) -> Iterator[Picture]:
    """The stream, which says at its first picture what it cost to come there."""
    picture = next(found)
    if reader.number == 0:
        seconds = time.perf_counter() - start
        log.info("%s shards: %d pictures skipped by reading %d, in %.1f s", reader.role, skip, reader.read, seconds)
    yield picture
    yield from found


def turns(world: int, workers: int, micro_batch_size: int, accumulate: int, steps: int) -> list[int]:
    """The reader that each picture of a role comes from, in the order of all ranks' pictures; begins anew after
    ``workers`` steps. Where two divisions agree in it, pictures come in the same order.
    """
    return [
        rank * workers + micro % workers
        for micro in range(steps * accumulate)
        for rank in range(world)
        for _ in range(micro_batch_size)
    ]


@dataclass(eq=False)
class ShardStream(IterableDataset):
    """Endless micro-batches of one rank, as ``pairs.Stream`` makes them, of roles that may be streamed.

    Micro-batch ``n`` of a rank, counted from step 0, is made by its reader ``n % workers``. So a resumed run, whose
    workers count from its first step on, finds each reader's place: after the micro-batches that it made before.
    """

    roles: list[FolderRole | ShardRole]
    micro_batch_size: int
    seed: int
    resolution: int
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
        own, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        first = self.first_step * self.accumulate + own
        number, skip = self.rank * workers + first % workers, first // workers * self.micro_batch_size
        records = [role.open(self.seed, number, self.world * workers, skip) for role in self.roles]
        for micro in count(first, workers):
            yield self.batch(*divmod(micro, self.accumulate), records)

    def batch(self, step: int, micro: int, records: list[Callable[[int], Record]]) -> dict[str, Any]:
        """Micro-batch ``micro`` of one optimizer step; the keys are those of ``pairs.Stream.batch``."""
        first = (micro * self.world + self.rank) * self.micro_batch_size
        chosen = [
            (role, number * self.global_size + position, record(step * self.global_size + position))
            for number, (role, record) in enumerate(zip(self.roles, records, strict=True))
            for position in range(first, first + self.micro_batch_size)
        ]
        prompts = [self.prompt(step, index, prompt) for _, index, (_, prompt, _) in chosen]
        batch: dict[str, Any] = {
            "step": step,
            "index": [index for _, index, _ in chosen],
            "global_size": self.global_size,
            "is_prior": torch.tensor([index >= self.global_size for _, index, _ in chosen]),
            "prompts": prompts,
            "paths": [place for _, _, (place, _, _) in chosen],
            "pixels": torch.stack([self.look(step, index, record) for _, index, record in chosen]),
        }
        conds = [role.conds[prompt] for (role, _, _), prompt in zip(chosen, prompts, strict=True) if role.conds]
        if conds:
            batch["cond"] = {name: torch.cat([cond[name] for cond in conds]) for name in conds[0]}
        return batch

    def prompt(self, step: int, index: int, prompt: str) -> str:
        """The prompt of a record, or the empty one; drawn as ``pairs.Stream`` draws it."""
        if not self.caption_dropout:
            return prompt
        chance = torch.rand((), generator=generator(self.seed, step, index, "caption"))
        return "" if chance < self.caption_dropout else prompt

    def look(self, step: int, index: int, record: Record) -> Tensor:
        """The pixels of a record under a fresh crop and flip; UserError when it is no picture."""
        place, _, file = record
        view = draw_view(generator(self.seed, step, index, "view"), self.center_crop, self.random_flip)
        try:
            return pixels(file, view, self.resolution)
        except Exception as error:  # decoders raise whatever they meet
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(f"{place} cannot be read ({reason}); make its shard again without it") from error
