"""The order of pictures that are streamed from tar shards, and the batches made of them."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from dreambooth.data.pairs import order, picture_at
from dreambooth.data.shards import Picture, pictures
from dreambooth.data.views import draw_view, pixels
from dreambooth.errors import UserError
from dreambooth.noise import generator

log = logging.getLogger(__name__)

Record = tuple[str, str, Path | BinaryIO]  # where it comes from, its prompt, and its file


@dataclass
class Reader:
    """What reader ``number`` of ``readers`` sees of a role's shards: an endless stream, a part of the pictures.

    In each of its epochs the shards are permuted and dealt out. When there are fewer shards than readers, those that
    share one take its pictures in turn, and the turns rotate. So no reader waits for another, whatever the numbers
    are: one with fewer pictures is in its next epoch earlier. Within an epoch the pictures pass through a buffer of
    ``shuffle`` pictures, all that is held in memory. The order is a function of (seed, epoch, number, readers).
    """

    shards: list[str]
    role: str
    seed: int
    shuffle: int
    number: int = 0
    readers: int = 1
    sizes: dict[str, int] = field(default_factory=dict)  # of the shards that were read to their end
    read: int = 0  # pictures that passed, those skipped included

    def stream(self, skip: int = 0) -> Iterator[Picture]:
        """The pictures from the first epoch on, without the first ``skip``; what is known in size is not read again."""
        for epoch in count():
            known = self.known_size(epoch)
            if known is not None and known <= skip:
                skip -= known
                continue
            for picture in self.shuffled(epoch):
                if skip:
                    skip -= 1
                else:
                    yield picture

    def dealt(self, epoch: int) -> tuple[list[str], int, int]:
        """The shards of an epoch, and of their pictures the first one and the step to the next."""
        dealt = [self.shards[place] for place in order(len(self.shards), self.seed, epoch, f"{self.role} shards")]
        if len(dealt) >= self.readers:
            return dealt[self.number :: self.readers], 0, 1
        place = self.number % len(dealt)
        sharers = len(range(place, self.readers, len(dealt)))
        return [dealt[place]], (self.number // len(dealt) + epoch) % sharers, sharers

    def known_size(self, epoch: int) -> int | None:
        """How many pictures an epoch has, once every shard in it has been read to its end."""
        dealt, first, step = self.dealt(epoch)
        if not all(shard in self.sizes for shard in dealt):
            return None
        return sum(len(range(first, self.sizes[shard], step)) for shard in dealt)

    def in_order(self, epoch: int) -> Iterator[Picture]:
        """The pictures of an epoch as the shards hold them."""
        dealt, first, step = self.dealt(epoch)
        for shard in dealt:
            yield from islice(self.counted(shard), first, None, step)

    def counted(self, shard: str) -> Iterator[Picture]:
        """The pictures of a shard; its size is known at the end."""
        size = 0
        for picture in pictures(shard):
            size += 1
            self.read += 1
            yield picture
        self.sizes[shard] = size

    def shuffled(self, epoch: int) -> Iterator[Picture]:
        """The pictures of an epoch, each exchanged with a random one of the buffer."""
        draws = generator(self.seed, epoch, self.number, self.readers, self.role, "shuffle")
        buffer: list[Picture] = []
        for picture in self.in_order(epoch):
            if len(buffer) < self.shuffle:
                buffer.append(picture)
                continue
            place = int(torch.randint(len(buffer), (), generator=draws))
            buffer[place], picture = picture, buffer[place]
            yield picture
        for place in torch.randperm(len(buffer), generator=draws).tolist():
            yield buffer[place]


@dataclass(frozen=True)
class FolderRole:
    """A role whose pictures lie in a folder: in the same order as without shards."""

    name: str
    prompt: str
    paths: list[Path]
    cond: dict[str, Tensor] | None

    def open(self, seed: int, number: int, readers: int, skip: int) -> Callable[[int], Record]:
        """The record at a place of the endless stream, which any reader can say."""

        def record(place: int) -> Record:
            path = self.paths[picture_at(place, len(self.paths), seed, self.name)]
            return str(path), self.prompt, path

        return record


@dataclass(frozen=True)
class ShardRole:
    """A role whose pictures are streamed; a picture's own caption is its prompt."""

    name: str
    prompt: str
    shards: list[str]
    shuffle: int
    cond: dict[str, Tensor] | None

    def open(self, seed: int, number: int, readers: int, skip: int) -> Callable[[int], Record]:
        """The next record of one reader, whatever the place."""
        reader = Reader(self.shards, self.name, seed, self.shuffle, number, readers)
        start, found = time.perf_counter(), reader.stream(skip)
        if skip:
            found = _announced(found, reader, skip, start)

        def record(place: int) -> Record:
            picture = next(found)
            own = picture.caption if self.cond is None else None
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
        id, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        first = self.first_step * self.accumulate + id
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
        batch: dict[str, Any] = {
            "step": step,
            "index": [index for _, index, _ in chosen],
            "global_size": self.global_size,
            "is_prior": torch.tensor([index >= self.global_size for _, index, _ in chosen]),
            "prompts": [prompt for _, _, (_, prompt, _) in chosen],
            "paths": [place for _, _, (place, _, _) in chosen],
            "pixels": torch.stack([self.look(step, index, record) for _, index, record in chosen]),
        }
        conds = [role.cond for role, _, _ in chosen if role.cond is not None]
        if conds:
            batch["cond"] = {name: torch.cat([cond[name] for cond in conds]) for name in conds[0]}
        return batch

    def look(self, step: int, index: int, record: Record) -> Tensor:
        """The pixels of a record under a fresh crop and flip; UserError when it is no picture."""
        place, _, file = record
        view = draw_view(generator(self.seed, step, index, "view"), self.center_crop, self.random_flip)
        try:
            return pixels(file, view, self.resolution)
        except Exception as error:  # decoders raise whatever they meet
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(f"{place} cannot be read ({reason}); make its shard again without it") from error
