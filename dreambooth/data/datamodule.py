"""The pictures of subjects and of their classes, ready for training: checked, drawn, encoded, in order."""

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.strategies import Strategy
from torch import ones_like
from torch.utils.data import DataLoader, IterableDataset

from dreambooth.data import checks
from dreambooth.data.annotations import Annotations
from dreambooth.data.buckets import bucket_shapes, pools
from dreambooth.data.classes import Drawing
from dreambooth.data.encoder import Encoder
from dreambooth.data.loader import loader
from dreambooth.data.pairs import Bucket, Role, Stream
from dreambooth.data.sources import INSTANCE, REGULARIZATION, Source, class_prompts, sources_of
from dreambooth.data.views import Shape, View, draw_view
from dreambooth.families.base import Family
from dreambooth.files import file_hash
from dreambooth.noise import generator
from dreambooth.parallel.watch import watched

log = logging.getLogger(__name__)


class DreamBoothDataModule(pl.LightningDataModule):
    """Pictures of one subject or several, and of their classes, as an endless stream of batches (``pairs.Stream``).

    ``check`` finds what a user can have got wrong. ``setup`` does it first, then draws the missing regularization
    pictures, encodes pictures and prompts, and moves the networks that do not learn to the CPU. All ranks share the
    work, on a common file system. ``counts`` says then how many pictures there are, what was made, how long it took.
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
        captions: str | None = None,
        caption_template: str = "{caption}",
        caption_dropout: float = 0.0,
        masks: str | None = None,
        mask_floor: float = 0.1,
        subjects: list[dict[str, Any]] | None = None,
        buckets: bool = False,
        bucket_ratio: float = 2.0,
        use_cached_latents: bool = True,
        with_prior_preservation: bool = True,
        train_text_encoder: bool = False,
        micro_batch_size: int = 1,
        seed: int = 1234,
        restore_from_path: str | None = None,
        prior: str = "images",
    ) -> None:
        super().__init__()
        self.family, self.seed = family, seed
        drawing = (dict(sampler), resolution, seed, num_reg_images, num_images_per_prompt)
        self.drawing = Drawing(family, restore_from_path, *drawing)
        folders = {
            "subjects": subjects,
            "instance_dir": instance_dir,
            "instance_prompt": instance_prompt,
            "regularization_dir": regularization_dir or "",
            "regularization_prompt": regularization_prompt,
            "cached_instance_dir": cached_instance_dir,
            "cached_reg_dir": cached_reg_dir,
        }
        self.subjects = sources_of(folders, with_prior_preservation and prior == "images")
        # With a teacher the class has no pictures of its own: its prompt, on the photos.
        self.taught = class_prompts(folders) if with_prior_preservation and prior == "teacher" else []
        self.instances, self.classes = (
            list(dict.fromkeys(subject[half] for subject in self.subjects if half < len(subject))) for half in (0, 1)
        )
        self.beside, self.caption_dropout = Annotations(captions, caption_template, masks, mask_floor), caption_dropout
        sides = resolution, family.size_multiple, bucket_ratio
        self.shapes: list[Shape] = bucket_shapes(*sides) if buckets else [resolution]
        self.resolution, self.center_crop, self.random_flip = resolution, center_crop, random_flip
        self.num_workers, self.micro_batch_size = num_workers, micro_batch_size
        self.cached_variants, self.train_data_repeats = cached_variants, train_data_repeats
        self.use_cached_latents, self.train_text_encoder = use_cached_latents, train_text_encoder
        self.counts: dict[str, Any] = {}
        self.ready: list[Bucket] = []

    def check(self) -> None:
        """Look for every mistake in folders and sizes, without drawing or encoding; UserError names the first one."""
        checks.resolution(self.resolution, self.family.vae_scale_factor)
        if self.resolution not in self.shapes:
            checks.bucket(self.resolution, self.family.size_multiple)
        for source in (*self.instances, *self.classes):
            self.check_source(source)
        for source in (*self.instances, *self.classes) if self.use_cached_latents else ():
            checks.writable(source.cache, source.cache_key)

    def check_source(self, source: Source) -> None:
        """Look for every mistake in a folder of pictures."""
        if source.role == INSTANCE:
            self.beside.check(source, self.family.vae_scale_factor)
            return
        for instance in self.instances:
            checks.apart(source.folder, instance.folder, source.key)
        self.drawing.inspect(source)

    @watched
    def setup(self, stage: str | None = None) -> None:
        """Fill the regularization folder and the caches, together with the other ranks, then free the device."""
        self.check()
        start = time.perf_counter()
        device = self.strategy.root_device
        with self.strategy.precision_plugin.forward_context():
            drawn = self.drawing.fill(self.classes, device, self.shared)
        filled = time.perf_counter()
        encoder = Encoder(self.family, device, self.use_cached_latents, self.shared)
        found = {source: self.beside.described(source) for source in (*self.instances, *self.classes)}
        photos = [path for source in self.instances for path in found[source]]
        self.ready = [self.bucket(shape, pool, found, encoder) for shape, pool in pools(photos, self.shapes).items()]
        self.settle()
        self.counts = {
            "num_instance": sum(len(found[source]) for source in self.instances),
            "num_regularization": sum(len(found[source]) for source in self.classes),
            "regularization_generated": drawn,
            "latents_encoded": encoder.made,
            "seconds": {"prepare_regularization": filled - start, "cache_latents": time.perf_counter() - filled},
        }
        self.report(encoder.found)

    def bucket(self, shape: Shape, pool: list[Path], found: dict[Source, dict[Path, str]], encoder: Encoder) -> Bucket:
        """What is learned from in one shape: the photos of its pool, and all pictures of their classes.

        Of a subject that has no photo in the pool it is all, so that subjects still take turns.
        """
        roles = {}
        for source, prompts in found.items():
            own = {path: prompts[path] for path in pool if path in prompts}
            roles[source] = self.role(source, shape, own or prompts, encoder)
        subjects = [[roles[source] for source in subject] for subject in self.subjects]
        for number, prompt in enumerate(self.taught):
            source = self.subjects[number][0]
            subjects[number].append(self.taught_role(source, roles[source], prompt, encoder))
        return Bucket(shape, subjects, len(pool))

    def taught_role(self, source: Source, own: Role, prompt: str, encoder: Encoder) -> Role:
        """The class as a teacher shows it: the photos, under its prompt, all of their cells alike."""
        name = source.name.replace(INSTANCE, REGULARIZATION)
        conds = None if own.conds is None else encoder.prompts(source, [prompt, *[""] * bool(self.caption_dropout)])
        weights = own.weights and [[ones_like(weight) for weight in variants] for variants in own.weights]
        masks = own.masks and replace(own.masks, kind=None)
        return replace(own, name=name, prompts=[prompt] * len(own.paths), conds=conds, weights=weights, masks=masks)

    def role(self, source: Source, shape: Shape, prompts: dict[Path, str], encoder: Encoder) -> Role:
        """Pictures of a source, with the prompt of each, in one shape; with what the networks say of them."""
        paths, masks = list(prompts), self.beside.masks_of(source, self.family.vae_scale_factor)
        moments = encoder.pictures(source, paths, self.views, shape) if self.use_cached_latents else None
        weights, conds = None, None
        if masks and self.use_cached_latents:
            weights = [[masks.weight(path, view, shape) for view in self.views(file_hash(path))] for path in paths]
        if not self.train_text_encoder:
            empty = [""] if self.caption_dropout else []
            conds = encoder.prompts(source, [*prompts.values(), *empty])
        return Role(source.name, list(prompts.values()), paths, moments, conds, weights, masks)

    def train_dataloader(self) -> DataLoader:
        """The endless stream from the trainer's step on; it has no length, so Lightning keeps no place in it."""
        return loader(self.stream(), self.num_workers)

    def stream(self) -> IterableDataset:
        """The micro-batches of this rank."""
        return Stream(self.ready, caption_dropout=self.caption_dropout, **self.division)

    @property
    def division(self) -> dict[str, Any]:
        """How a stream divides the pictures over steps and ranks, and looks at them."""
        assert self.trainer is not None
        return {
            "micro_batch_size": self.micro_batch_size,
            "seed": self.seed,
            "rank": self.trainer.global_rank,
            "world": self.trainer.world_size,
            "accumulate": self.trainer.accumulate_grad_batches,
            "first_step": self.trainer.global_step,
            "center_crop": self.center_crop,
            "random_flip": self.random_flip,
        }

    @property
    def paired(self) -> bool:
        """Whether a picture of its class stands beside each photo."""
        return bool(self.classes or self.taught)

    @property
    def epoch_size(self) -> int:
        """How many photos an epoch counts: each ``train_data_repeats`` times."""
        return self.train_data_repeats * sum(len(self.beside.pictures(source)) for source in self.instances)

    @property
    def strategy(self) -> Strategy:
        """What knows the device and how to wait for the other ranks."""
        assert self.trainer is not None
        return self.trainer.strategy

    @property
    def shared(self) -> dict[str, Any]:
        """How the ranks share work, as ``regularization.fill`` and ``latents.gather`` take it."""
        trainer: Any = self.trainer
        return {"rank": trainer.global_rank, "world": trainer.world_size, "barrier": trainer.strategy.barrier}

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

    def report(self, latents: int = 0) -> None:
        """Say in one line what was found and what was made."""
        counts = self.counts
        found = [f"{counts['num_regularization']} regularization pictures"] * bool(self.classes)
        found += [f"{latents} latents"] * self.use_cached_latents
        drawn, encoded = counts["regularization_generated"], counts["latents_encoded"]
        made = [f"{drawn} pictures drawn"] * (drawn > 0) + [f"{encoded} latents encoded"] * (encoded > 0)
        if self.cached_variants == 1 and self.use_cached_latents and (self.random_flip or not self.center_crop):
            log.warning("each picture keeps one random crop and flip; model.data.cached_variants=8 gives it eight")
        outcome = f"ready, {' and '.join(made)}" if made else "found, nothing to make"
        log.info("%s %s", " and ".join(found) or "photos", outcome)
