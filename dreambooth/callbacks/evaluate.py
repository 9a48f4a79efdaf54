"""Evaluation in training: curves, the best step, early stopping, and the final table."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dreambooth.callbacks.loggers import tell
from dreambooth.config import build
from dreambooth.devices import on_device
from dreambooth.evaluation import FOLDER, write
from dreambooth.files import atomic
from dreambooth.metrics import measure
from dreambooth.metrics.curves import CURVES, read_curves, write_curves
from dreambooth.metrics.tradeoff import Tradeoff
from dreambooth.noise import seed_of
from dreambooth.picture_files import batches_of, draw_batch, draw_through, foreign_picture, missing
from dreambooth.progress import progress_bar

log = logging.getLogger(__name__)
BEST = "checkpoints/best.safetensors"


class Evaluate(pl.Callback):
    """Measures the untouched base, then every ``every_n_train_steps``, and keeps the step of the best trade-off.

    Writes ``curves.csv`` (a row an evaluation), ``checkpoints/best.safetensors`` (what learned, at the best step so
    far), and at the end, with those weights in place, ``evaluation/``: the pictures of the ``evaluate`` node before and
    after, ``scores.jsonl`` and ``metrics.json``. The pictures of the curves have other seeds than those of the table.

    Only the first rank measures; all ranks stop together. ``seconds`` is the time spent here in this process.

    Args:
        cfg: the whole tree (this callback's card is ``_partial_``).
        every_n_train_steps: null draws no curve, keeps no best and stops at nothing; the table is made all the same.
        num_images_per_prompt, num_class_images, seed: of the curves' pictures; their prompts are evaluate.prompts.
        drift_weight, least_drift, patience, max_drift, max_forgetting, target: see ``Tradeoff``.
    """

    def __init__(
        self,
        cfg: DictConfig,
        every_n_train_steps: int | None = 250,
        num_images_per_prompt: int = 2,
        num_class_images: int = 4,
        seed: int = 1234,
        drift_weight: float = 1.0,
        least_drift: float | None = None,
        patience: int | None = 3,
        max_drift: float | None = 0.5,
        max_forgetting: float | None = 0.5,
        target: float | None = None,
    ) -> None:
        self.final: dict[str, Any] = dict(OmegaConf.to_container(cfg.evaluate, resolve=True))  # type: ignore[arg-type]
        # Of a purpose of its own: with seed=evaluate.seed the pictures that choose a step would be those that judge it.
        counts = {"num_images_per_prompt": num_images_per_prompt, "num_class_images": num_class_images}
        counts["seed"] = seed_of(seed, "curve")
        self.curve = {**self.final, **counts}
        self.model, self.every, self.resolution = cfg.model, every_n_train_steps, cfg.model.data.resolution
        self.subjects, self.suite = measure.Subject.all_of(cfg), build(cfg.metrics)
        self.asked = [measure.wanted(how, self.subjects) for how in (self.curve, self.final)]
        photos = self.suite.summary(measure.score_photos(self.suite, self.subjects))
        self.tradeoff = Tradeoff(
            photos.get("dino"),
            measure.unheard(self.suite, self.asked[0]),
            drift_weight=drift_weight,
            least_drift=least_drift,
            patience=patience,
            max_drift=max_drift,
            max_forgetting=max_forgetting,
            target=target,
        )
        self.seconds = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._read(trainer)
        if trainer.global_step == 0:
            # Rows are there when a run that was killed before its first checkpoint has measured the base.
            if self.every and not self.tradeoff.rows:
                self._measure(trainer, pl_module)
            self._draw_set(trainer, pl_module, "before")
        self._stop_if_told(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: object) -> None:
        step = trainer.global_step
        if self.every and step % self.every == 0 and step != self._measured():
            self._measure(trainer, pl_module)
            self._stop_if_told(trainer)

    # Not on_train_end: Lightning skips it for a run that was killed after its last step and has nothing to train.
    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        folder = Path(trainer.default_root_dir)
        self._read(trainer)
        if self.every and self._measured() != trainer.global_step:
            self._measure(trainer, pl_module)
        best = self._settle(trainer, pl_module)
        self._draw_set(trainer, pl_module, "after")
        if trainer.is_global_zero:
            self._redraw_base(folder / FOLDER / "before", trainer.strategy.root_device)
            self._write(folder / FOLDER, best, trainer.max_steps)

    def _settle(self, trainer: pl.Trainer, pl_module: Any) -> int:
        """Put the weights of the best step in place, where they were kept; the step that is exported."""
        last, path = trainer.global_step, Path(trainer.default_root_dir) / BEST
        best = self.tradeoff.best() if self.every else last
        if best == last:
            return last
        if kept_step(path) != best:  # of a killed run that had come further, and did not come to the same
            log.warning("step %d was the best, but %s is not of it: the last step is exported", best, path)
            return last
        log.info("step %d has the best trade-off of likeness and drift: it is kept and exported", best)
        pl_module.settle_on(load_file(path))
        return best

    def _read(self, trainer: pl.Trainer) -> None:
        """Take up the curves of this run; only the first rank reads, as it alone writes them."""
        path = Path(trainer.default_root_dir) / CURVES
        rows = read_curves(path, trainer.global_step) if trainer.is_global_zero else []
        self.tradeoff.rows = trainer.strategy.broadcast(rows)

    def _measured(self) -> int | None:
        return self.tradeoff.rows[-1]["step"] if self.tradeoff.rows else None

    def _measure(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """One row of the curves; the weights are kept when none before was better."""
        folder, step = Path(trainer.default_root_dir), trainer.global_step
        means: dict[str, float | None] = {}
        with self._at_work(trainer, pl_module) as works:
            if works:
                pictures = measure.pictures_of(self.asked[0], self.curve, "", "", self.resolution)
                rows = measure.picture_rows(Path("curve"), pictures, self.asked[0])
                means = self.suite.summary(
                    measure.score(self.suite, rows, self._draw(pl_module, pictures), self.subjects)
                )
        row = self.tradeoff.add(step, trainer.strategy.broadcast(means))
        if step and self.every and self.tradeoff.best() == step:
            with pl_module.averaged():
                if trainer.is_global_zero:
                    self._keep(pl_module, folder / BEST, step)
        if trainer.is_global_zero:
            write_curves(folder / CURVES, self.tradeoff.rows)
            tell(trainer, {f"evaluate/{name}": value for name, value in row.items() if name != "step"}, step)

    def _draw(self, pl_module: Any, pictures: list[dict[str, Any]]) -> list[Image.Image]:
        pipeline, drawn = pl_module.family.to_pipeline(), []
        with progress_bar(len(pictures), "drawing pictures to measure", "picture") as bar:
            bar.leave = False
            for batch in batches_of(pictures):
                drawn += draw_batch(pipeline, [pictures[i] for i in batch])
                bar.update(len(batch))
        return drawn

    def _draw_set(self, trainer: pl.Trainer, pl_module: Any, name: str) -> None:
        with self._at_work(trainer, pl_module) as works:
            if not works:
                return
            family = pl_module.family
            weights = family.fingerprint(fresh=True)
            pictures = measure.pictures_of(self.asked[1], self.final, "", weights, self.resolution)
            folder = Path(trainer.default_root_dir) / FOLDER / name
            while (stale := foreign_picture(folder, pictures)) is not None:
                stale.unlink()  # of the same run when its goal was nearer
            store = self.final["base_dir"] if name == "before" else None
            draw_through(store, family, folder, pictures, f"drawing the pictures {name}")

    def _redraw_base(self, folder: Path, device: torch.device) -> None:
        """What was lost or cut short of the pictures before, by the base as it came: here it has learned by now."""
        if not missing(folder, measure.pictures_of(self.asked[1], self.final, "", "", self.resolution)):
            return
        began, family = time.perf_counter(), build(self.model.family)
        with build(self.model.tuning)(family).merged(), on_device(family, device):
            weights = family.fingerprint(fresh=True)
            pictures = measure.pictures_of(self.asked[1], self.final, "", weights, self.resolution)
            draw_through(self.final["base_dir"], family, folder, pictures, "drawing the pictures before")
        self.seconds += time.perf_counter() - began

    def _write(self, folder: Path, best: int, goal: int) -> None:
        began = time.perf_counter()
        rows = measure.score_photos(self.suite, self.subjects)
        pictures = measure.pictures_of(self.asked[1], self.final, "", "", self.resolution)
        for name in ("before", "after"):
            part = measure.picture_rows(folder / name, pictures, self.asked[1])
            rows += measure.score(self.suite, part, measure.open_all(folder, part), self.subjects)
        stopped = self.tradeoff.verdict() if self._measured() != goal else None
        write(folder, self.suite, rows, self.subjects, best_step=best, stopped=stopped)
        self.seconds += time.perf_counter() - began

    def _stop_if_told(self, trainer: pl.Trainer) -> None:
        reason = self.tradeoff.verdict()
        if reason and trainer.global_step < trainer.max_steps:
            log.info("stopping at step %d: %s", trainer.global_step, reason)
            trainer.should_stop = True

    @contextmanager
    def _at_work(self, trainer: pl.Trainer, pl_module: Any) -> Iterator[bool]:
        """Averaged weights in place, networks and encoders on the device; the encoders rest on the CPU otherwise.

        All ranks enter together; whether this one works.
        """
        began, device = time.perf_counter(), trainer.strategy.root_device
        with pl_module.finished():
            if not trainer.is_global_zero:
                yield False
                return
            with on_device(pl_module.family, device):
                self.suite.move(device)
                try:
                    yield True
                finally:
                    self.suite.move(torch.device("cpu"))
        self.seconds += time.perf_counter() - began

    def _keep(self, pl_module: Any, path: Path, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {name: value.contiguous() for name, value in pl_module.learned.state_dict().items()}
        with atomic(path) as temporary:
            save_file(state, temporary, metadata={"step": str(step)})


def kept_step(path: Path) -> int | None:
    """The step whose weights a file holds; None without a file, or one that does not say."""
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        step = (file.metadata() or {}).get("step")
    return None if step is None else int(step)
