"""Pictures of the subject or of its class from tar shards, in numbers that no folder should hold."""

import logging
import time
from math import lcm
from typing import Any

from dreambooth.data.datamodule import DreamBoothDataModule
from dreambooth.data.encoder import Encoder
from dreambooth.data.shards import expand, inspect, pictures
from dreambooth.data.sources import INSTANCE, REGULARIZATION, Source
from dreambooth.data.streaming import FolderRole, ShardRole, ShardStream, turns
from dreambooth.errors import UserError
from dreambooth.families.base import Family
from dreambooth.parallel.watch import watched

log = logging.getLogger(__name__)

KEYS = {INSTANCE: "model.data.instance_shards", REGULARIZATION: "model.data.regularization_shards"}
ANOTHER = "from here on the pictures come in another order than they would have come in"


class ShardedDataModule(DreamBoothDataModule):
    """Instance pictures, regularization pictures or both from tar shards; a role without shards has its folder.

    Every step encodes its pictures: a cache of a set that no disk should hold in files would be such a set again. If
    any picture has a caption (``shards.inspect``), every step reads its prompts too. See ``readers.Reader`` for the
    order; it depends on the number of readers, ranks times loader processes, and on whose turn it is
    (``streaming.turns``), which checkpoints keep.
    """

    def __init__(
        self,
        family: Family,
        instance_shards: str | list[str] | None = None,
        regularization_shards: str | list[str] | None = None,
        instance_dir: str | None = None,
        shuffle: int = 256,
        use_cached_latents: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(family, instance_dir=instance_dir or "", use_cached_latents=False, **settings)
        given = {INSTANCE: instance_shards, REGULARIZATION: regularization_shards}
        self.roles = {source.role: source for source in self.subjects[0]}
        self.given = {role: shards for role, shards in given.items() if shards and role in self.roles}
        self.shuffle, self.wants_cache, self.has_folder = shuffle, use_cached_latents, bool(instance_dir)
        self.shards: dict[str, list[str]] = {}
        self.captioned = False

    def check(self) -> None:
        """As of folders; shards are opened, and their first picture and their end looked at."""
        if not self.given:
            raise UserError(f"model/data=webdataset: no shards are named; type {KEYS[INSTANCE]}='shards/*.tar'")
        if self.taught:
            raise UserError("model.prior=teacher looks twice at each photo, shards do not: type model.prior=images")
        beside = {
            "subjects": len(self.subjects) > 1,
            "buckets": self.shapes != [self.resolution],
            "masks": self.beside.masks,
            "captions": self.beside.captions and INSTANCE in self.given,
        }
        for key, value in beside.items():
            if value:
                raise UserError(f"model.data.{key} is for folders, not for shards; take it back, or model/data=folder")
        super().check()

    def check_source(self, source: Source) -> None:
        """Look for every mistake in the pictures of a role."""
        role = source.role
        if role in self.given:
            self.shards[role] = expand(self.given[role], KEYS[role])
            self.captioned |= inspect(self.shards[role], KEYS[role])
        elif role == INSTANCE and not self.has_folder:
            raise UserError(f"neither {KEYS[role]} nor {source.key} is set; type one of them")
        else:
            super().check_source(source)

    @watched
    def setup(self, stage: str | None = None) -> None:
        """Draw what the regularization folder lacks, if it has one; encode the prompts; free the device."""
        self.check()
        start = time.perf_counter()
        device, folders = self.strategy.root_device, [each for each in self.classes if each.role not in self.given]
        with self.strategy.precision_plugin.forward_context():
            drawn = self.drawing.fill(folders, device, self.shared)
        filled = time.perf_counter()
        encoder = Encoder(self.family, device, False, self.shared)
        self.ready = [self.streamed(source, encoder) for source in self.roles.values()]  # type: ignore[misc]
        self.settle()
        found = {role.name: len(role.paths) for role in self.ready if isinstance(role, FolderRole)}
        self.counts = {
            "num_instance": found.get(INSTANCE),
            "num_regularization": found.get(REGULARIZATION, None if REGULARIZATION in self.given else 0),
            "num_shards": {name: len(shards) for name, shards in self.shards.items()},
            "regularization_generated": drawn,
            "latents_encoded": 0,
            "seconds": {"prepare_regularization": filled - start, "cache_latents": time.perf_counter() - filled},
        }
        self.report()

    def streamed(self, source: Source, encoder: Encoder) -> FolderRole | ShardRole:
        """What is streamed, with the embeddings of its prompt unless every step reads prompts."""
        read, empty = self.train_text_encoder or self.captioned, [""] * bool(self.caption_dropout)
        if source.role in self.shards:
            conds = None if read else encoder.prompts(source, [source.prompt, *empty])
            return ShardRole(source.name, source.prompt, self.shards[source.role], self.shuffle, conds)
        found = self.beside.described(source)
        conds = None if read else encoder.prompts(source, [*found.values(), *empty])
        return FolderRole(source.name, list(found.values()), list(found), conds)

    def stream(self) -> ShardStream:
        """The micro-batches of this rank."""
        how = {"resolution": self.resolution, "caption_dropout": self.caption_dropout, **self.division}
        return ShardStream(self.ready, **how)  # type: ignore[arg-type]

    @property
    def epoch_size(self) -> int:
        """How many photos an epoch counts; those in shards are counted by reading them all."""
        if INSTANCE not in self.shards:
            return super().epoch_size
        start = time.perf_counter()
        size = sum(1 for shard in self.shards[INSTANCE] for _ in pictures(shard))
        log.info("%d instance pictures in the shards, counted in %.1f s", size, time.perf_counter() - start)
        return self.train_data_repeats * size

    def settle(self) -> None:
        """Free the device; the text encoder stays when every step reads prompts."""
        super().settle()
        for name in self.family.networks if self.captioned else ():
            if name.startswith("text_encoder"):
                self.family.move(self.strategy.root_device, name)

    def report(self, latents: int = 0) -> None:
        """Say in one line what was found."""
        found = [f"{len(shards)} {name} shard{'s' * (len(shards) > 1)}" for name, shards in self.shards.items()]
        prompts = "with captions" if self.captioned else "without captions"
        log.info("%s %s; each step encodes its pictures", " and ".join(found), prompts)
        if self.wants_cache:
            log.info("model.use_cached_latents=true counts for folders, not beside shards")

    @property
    def readers(self) -> int:
        """How many share the shards."""
        assert self.trainer is not None
        return self.trainer.world_size * max(1, self.num_workers)

    @property
    def shares(self) -> dict[str, int]:
        """What decides, beside the seed, which reader a picture comes from: the arguments of ``streaming.turns``."""
        assert self.trainer is not None
        return {
            "world": self.trainer.world_size,
            "workers": max(1, self.num_workers),
            "micro_batch_size": self.micro_batch_size,
            "accumulate": self.trainer.accumulate_grad_batches,
        }

    def state_dict(self) -> dict[str, Any]:
        """What the order depends on beside the seed."""
        return {"readers": self.readers, "shares": self.shares}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Say so when the order is another from here on."""
        before, now = state_dict.get("shares", self.shares), self.shares  # older checkpoints know of readers only
        steps = lcm(before["workers"], now["workers"])
        if state_dict["readers"] != self.readers:
            log.warning(
                "%d readers (ranks x model.data.num_workers) shared the shards, now %d do: %s",
                *(state_dict["readers"], self.readers, ANOTHER),
            )
        elif turns(**before, steps=steps) != turns(**now, steps=steps):
            log.warning(
                "the %d readers of the shards took turns by %d x %d pictures a step (trainer.accumulate_grad_batches x "
                "model.micro_batch_size) with %d of them a rank, now by %d x %d with %d: %s",
                self.readers,
                *(each[key] for each in (before, now) for key in ("accumulate", "micro_batch_size", "workers")),
                ANOTHER,
            )
