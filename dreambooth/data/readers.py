"""The order of pictures that are streamed from tar shards."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, islice

import torch

from dreambooth.data.pairs import order
from dreambooth.data.shards import Picture, pictures
from dreambooth.noise import generator


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
