"""The pictures of one subject and of its class, ready for training: checked, drawn, encoded, in order."""

import logging
import signal
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from diffusers import DiffusionPipeline
from pytorch_lightning.strategies import Strategy
from torch.utils.data import DataLoader, IterableDataset

from dreambooth.data import checks, regularization
from dreambooth.data.encoder import Encoder
from dreambooth.data.pairs import Role, Stream
from dreambooth.data.views import View, draw_view
from dreambooth.families.base import Family
from dreambooth.files import list_pictures
from dreambooth.noise import generator

log = logging.getLogger(__name__)

INSTANCE, REGULARIZATION = "instance", "regularization"
FOLDER_KEYS = {INSTANCE: "model.data.instance_dir", REGULARIZATION: regularization.KEY}
CACHE_KEYS = {INSTANCE: "model.data.cached_instance_dir", REGULARIZATION: "model.data.cached_reg_dir"}


class DreamBoothDataModule(pl.LightningDataModule):
    """Instance and regularization pictures as an endless stream of micro-batches (see ``pairs.Stream``).

    ``check`` finds what a user can have got wrong. ``setup`` does it first, then draws the missing regularization
    pictures, encodes pictures and prompts, and moves the networks that do not learn to the CPU. All ranks share the
    work, on a common file system. ``counts`` says afterwards how many pictures there are, what was made, and how long
    it took. With ``prior`` "teacher" the class has no pictures: its prompt goes with those of the instance, and its
    folder is neither read nor filled.
    """

    def __init__(
        self,
        family: Family,
        instance_dir: str,
        instance_prompt: str,
        regularization_dir: str | None,
        regularization_prompt: str | None,
        sampler: dict[str, Any],
        num_reg_images: int = 200,
        num_images_per_prompt: int = 4,
        resolution: int = 512,
        center_crop: bool = True,
        random_flip: bool = False,
        num_workers: int = 0,
        cached_instance_dir: str | None = None,
        cached_reg_dir: str | None = None,
        cached_variants: int = 1,
        train_data_repeats: int = 1,
        use_cached_latents: bool = True,
        with_prior_preservation: bool = True,
        train_text_encoder: bool = False,
        micro_batch_size: int = 1,
        seed: int = 1234,
        restore_from_path: str | None = None,
        prior: str = "images",
    ) -> None:
        super().__init__()
        self.family, self.restore_from_path, self.sampler, self.seed = family, restore_from_path, dict(sampler), seed
        self.prompts = {INSTANCE: instance_prompt, REGULARIZATION: regularization_prompt or ""}
        folders = {INSTANCE: instance_dir, REGULARIZATION: regularization_dir or ""}
        caches = {INSTANCE: cached_instance_dir, REGULARIZATION: cached_reg_dir}
        self.folders = {role: Path(folder).expanduser() for role, folder in folders.items()}
        self.caches = {role: Path(caches[role] or f"{folders[role]}_cached").expanduser() for role in folders}
        self.roles = (INSTANCE, REGULARIZATION) if with_prior_preservation else (INSTANCE,)
        self.sources = {role: INSTANCE if prior == "teacher" else role for role in self.roles}  # of the pictures
        self.num_reg_images, self.num_images_per_prompt = num_reg_images, num_images_per_prompt
        self.resolution, self.center_crop, self.random_flip = resolution, center_crop, random_flip
        self.num_workers, self.micro_batch_size = num_workers, micro_batch_size
        self.cached_variants, self.train_data_repeats = cached_variants, train_data_repeats
        self.use_cached_latents, self.train_text_encoder = use_cached_latents, train_text_encoder
        self.counts: dict[str, Any] = {}
        self.ready: list[Role] = []

    def check(self) -> None:
        """Look for every mistake in folders and sizes, without drawing or encoding; UserError names the first one."""
        checks.resolution(self.resolution, self.family.factor)
        for role in dict.fromkeys(self.sources.values()):
            self.check_role(role)
        for role in dict.fromkeys(self.sources.values()) if self.use_cached_latents else ():
            checks.writable(self.caches[role], CACHE_KEYS[role])

    def check_role(self, role: str) -> None:
        """Look for every mistake in a role's pictures."""
        if role == INSTANCE:
            list_pictures(self.folders[INSTANCE], FOLDER_KEYS[INSTANCE])
            return
        checks.apart(self.folders[REGULARIZATION], self.folders[INSTANCE], regularization.KEY)
        checks.writable(self.folders[REGULARIZATION], regularization.KEY)
        regularization.inspect(self.folders[REGULARIZATION], self.settings())

    def setup(self, stage: str | None = None) -> None:
        """Fill the regularization folder and the caches, together with the other ranks, then free the device."""
        self.check()
        start = time.perf_counter()
        drawn = self.draw_missing() if REGULARIZATION in self.sources.values() else 0
        filled = time.perf_counter()
        caches = {role: (self.caches[role], CACHE_KEYS[role]) for role in self.roles if self.use_cached_latents}
        encoder = Encoder(self.family, self.strategy.root_device, self.resolution, caches, self.shared)
        self.ready, encoded = [], 0
        for role, source in self.sources.items():
            paths = list_pictures(self.folders[source], FOLDER_KEYS[source], known=(regularization.MANIFEST,))
            moments, made = encoder.pictures(source, paths, self.views) if self.use_cached_latents else (None, 0)
            cond = None if self.train_text_encoder else encoder.prompt(source, self.prompts[role])
            self.ready.append(Role(role, self.prompts[role], paths, moments, cond))
            encoded += made
        self.settle()
        self.counts = {
            "num_instance": len(self.ready[0].paths),
            "num_regularization": sum(len(role.paths) for role in self.ready if self.sources[role.name] != INSTANCE),
            "regularization_generated": drawn,
            "latents_encoded": encoded,
            "seconds": {"prepare_regularization": filled - start, "cache_latents": time.perf_counter() - filled},
        }
        self.report()

    def train_dataloader(self) -> DataLoader:
        """The endless stream from the trainer's step on; it has no length, so Lightning keeps no place in it."""
        several = self.num_workers > 0
        return DataLoader(
            self.stream(),
            None,
            num_workers=self.num_workers,
            persistent_workers=several,
            worker_init_fn=outlive_signals,
        )

    def stream(self) -> IterableDataset:
        """The micro-batches of this rank."""
        return Stream(self.ready, **self.division)

    @property
    def division(self) -> dict[str, Any]:
        """How ``Stream`` divides the pictures over steps and ranks, and looks at them."""
        assert self.trainer is not None
        return {
            "micro_batch_size": self.micro_batch_size,
            "seed": self.seed,
            "rank": self.trainer.global_rank,
            "world": self.trainer.world_size,
            "accumulate": self.trainer.accumulate_grad_batches,
            "first_step": self.trainer.global_step,
            "resolution": self.resolution,
            "center_crop": self.center_crop,
            "random_flip": self.random_flip,
        }

    @property
    def epoch_size(self) -> int:
        """How many photos an epoch counts: each one ``train_data_repeats`` times."""
        return self.train_data_repeats * len(list_pictures(self.folders[INSTANCE], FOLDER_KEYS[INSTANCE]))

    @property
    def strategy(self) -> Strategy:
        """What knows the device and how to wait for the other ranks."""
        assert self.trainer is not None
        return self.trainer.strategy

    @property
    def shared(self) -> dict[str, Any]:
        """How the ranks share work, as ``regularization.fill`` and ``latents.gather`` take it."""
        assert self.trainer is not None
        return {
            "rank": self.trainer.global_rank,
            "world": self.trainer.world_size,
            "barrier": self.trainer.strategy.barrier,
        }

    def settings(self) -> dict[str, Any]:
        """What the regularization pictures depend on, as their manifest holds it."""
        return {
            "base": self.family.fingerprint() if self.draws_itself else str(self.restore_from_path),
            "prompt": self.prompts[REGULARIZATION],
            **self.sampler,
            "resolution": self.resolution,
            "seed": self.seed,
            "num_images_per_prompt": self.num_images_per_prompt,
        }

    @property
    def draws_itself(self) -> bool:
        """Whether the family, still untouched, draws the regularization pictures."""
        return self.restore_from_path in (None, self.family.source)

    def draw_missing(self) -> int:
        """Draw the missing regularization pictures in the trainer's precision; how many all ranks drew."""
        with self.strategy.precision_plugin.forward_context():
            return regularization.fill(
                self.drawing_pipeline,
                self.folders[REGULARIZATION],
                self.num_reg_images,
                self.settings(),
                **self.shared,
            )

    def drawing_pipeline(self) -> DiffusionPipeline:
        """The family, or the model that ``restore_from_path`` names, on the device."""
        family = self.family if self.draws_itself else type(self.family)(self.restore_from_path)  # type: ignore
        family.move(self.strategy.root_device)
        return family.to_pipeline()

    def views(self, content: str) -> list[View]:
        """The cached crops and flips of a picture, drawn from the seed and the hash of its bytes."""
        random = self.random_flip or not self.center_crop
        return [
            draw_view(generator(self.seed, content, variant, "view"), self.center_crop, self.random_flip)
            for variant in range(self.cached_variants if random else 1)
        ]

    def settle(self) -> None:
        """Move the networks that do not learn off the device, except the VAE when every step encodes."""
        for name, network in self.family.networks.items():
            if name == "vae" and not self.use_cached_latents:
                self.family.move(self.strategy.root_device, name)
            elif not any(weight.requires_grad for weight in network.parameters()):
                self.family.move("cpu", name)

    def report(self) -> None:
        """Say in one line what was found and what was made."""
        counts = self.counts
        own = [role for role in self.ready if self.sources[role.name] == role.name]
        latents = sum(len(variants) for role in own for variants in role.moments or [])
        found = [f"{counts['num_regularization']} regularization pictures"] * (len(own) > 1)
        found += [f"{latents} latents"] * self.use_cached_latents
        drawn, encoded = counts["regularization_generated"], counts["latents_encoded"]
        made = [f"{drawn} pictures drawn"] * (drawn > 0) + [f"{encoded} latents encoded"] * (encoded > 0)
        if self.cached_variants == 1 and self.use_cached_latents and (self.random_flip or not self.center_crop):
            log.warning("each picture keeps one random crop and flip; model.data.cached_variants=8 gives it eight")
        outcome = f"ready, {' and '.join(made)}" if made else "found, nothing to make"
        log.info("%s %s", " and ".join(found) or "photos", outcome)


def outlive_signals(worker: int) -> None:
    """Let a loader's process live on when its rank is told to stop, which has a step to end first.

    A terminal and SLURM send their signals to it, too. After TERM it ends half a minute later, lest nobody ends it.
    """
    for sign in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(sign, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))
