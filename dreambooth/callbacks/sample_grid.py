"""samples/: the same prompts and seeds, again and again while the model learns."""

import time
from itertools import product
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig
from PIL import Image

from dreambooth.callbacks.loggers import show
from dreambooth.data.sources import prompts_of_each
from dreambooth.devices import on_device
from dreambooth.families.base import Family
from dreambooth.files import atomic
from dreambooth.grid import labelled_grid
from dreambooth.progress import progress_bar
from dreambooth.prompts import read_prompts
from dreambooth.sampling import draw, picture_seed


class SampleGrid(pl.Callback):
    """Draw ``samples/step_000000.png`` before training, one every ``every_n_train_steps`` (null: none), one at the end.

    In float32, with the averaged weights where they are kept; a grid that exists is not drawn again. Only the first
    rank draws, while the others wait in their next step, ``batch_size`` pictures at once (null: those of a prompt). Of
    several subjects each has the first one's prompts, in its own words. ``seconds`` is the time spent here in this
    process.
    """

    def __init__(
        self,
        cfg: DictConfig,
        prompts: str | list[str],
        every_n_train_steps: int | None,
        num_images_per_prompt: int,
        seed: int,
        inference_steps: int,
        unconditional_guidance_scale: float,
        sampler_type: str,
        resolution: int,
        guidance_rescale: float = 0.0,
        batch_size: int | None = None,
    ) -> None:
        self.prompts = prompts_of_each(
            read_prompts(prompts, "callbacks.sample_grid.prompts"), cfg.model.data.get("subjects")
        )
        self.every, self.count = every_n_train_steps, num_images_per_prompt
        self.batch_size = batch_size or num_images_per_prompt
        self.seed, self.steps, self.guidance = seed, inference_steps, unconditional_guidance_scale
        self.guidance_rescale, self.sampler_type, self.resolution = guidance_rescale, sampler_type, resolution
        self.seconds = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._sample_if_due(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: object) -> None:
        self._sample_if_due(trainer, pl_module)

    # Not on_train_end: Lightning skips it for a run that was killed after its last step and has nothing to train.
    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._sample(trainer, pl_module)

    def _sample_if_due(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.global_step == 0 or (self.every and trainer.global_step % self.every == 0):
            self._sample(trainer, pl_module)

    def _sample(self, trainer: pl.Trainer, pl_module: Any) -> None:
        path = Path(trainer.default_root_dir) / "samples" / f"step_{trainer.global_step:06d}.png"
        if trainer.strategy.broadcast(path.exists()):
            return
        began = time.perf_counter()
        with pl_module.finished():
            if trainer.is_global_zero:
                with on_device(pl_module.family, trainer.strategy.root_device):
                    rows = self._draw(pl_module.family)
                grid = labelled_grid(rows, self.prompts)
                with atomic(path) as temporary:
                    grid.save(temporary, format="PNG")
                show(trainer, "samples", grid, trainer.global_step)
        self.seconds += time.perf_counter() - began

    def _draw(self, family: Family) -> list[list[Image.Image]]:
        """A row of pictures for each prompt."""
        pipeline, drawn, wanted = family.to_pipeline(), [], list(product(range(len(self.prompts)), range(self.count)))
        with progress_bar(len(wanted), "drawing samples", "picture") as bar:
            bar.leave = False
            for first in range(0, len(wanted), self.batch_size):
                batch = wanted[first : first + self.batch_size]
                drawn += draw(
                    pipeline,
                    [self.prompts[prompt] for prompt, _ in batch],
                    [picture_seed(self.seed, prompt, picture) for prompt, picture in batch],
                    steps=self.steps,
                    guidance=self.guidance,
                    guidance_rescale=self.guidance_rescale,
                    sampler_type=self.sampler_type,
                    resolution=self.resolution,
                )
                bar.update(len(batch))
        return [drawn[first : first + self.count] for first in range(0, len(drawn), self.count)]
