"""summary.json: what a run took and where it came out, for tools to read."""

import json
import math
import platform
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytorch_lightning as pl
import torch

from dreambooth import __version__
from dreambooth.callbacks.clock import training_clock
from dreambooth.callbacks.evaluate import Evaluate
from dreambooth.callbacks.metrics_csv import metrics_path, read_rows, samples_per_step
from dreambooth.callbacks.sample_grid import SampleGrid
from dreambooth.evaluation import FOLDER, METRICS
from dreambooth.files import atomic
from dreambooth.module import LOSSES

LAST_STEPS = 20
PACKAGES = ("torch", "pytorch-lightning", "diffusers", "transformers", "hydra-core")


class Summary(pl.Callback):
    """Write summary.json at the very end (after export): a folder that has one is finished.

    Times, counts of drawn and encoded pictures and peak memory are those of this process; ``final`` is the mean of the
    last 20 rows of metrics.csv. ``seconds.train`` is the loop with its data, metrics and checkpoints, without sampling.
    """

    def __init__(self) -> None:
        self._resumed_from: int | None = None
        self._train = 0.0
        self._steps = self._samples = 0

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._resumed_from = checkpoint["global_step"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first, self._clock = trainer.global_step, training_clock(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        self._samples = samples_per_step(trainer, batch)
        self._train, self._steps = training_clock(trainer) - self._clock, trainer.global_step - self._first

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            with atomic(Path(trainer.default_root_dir) / "summary.json") as temporary:
                temporary.write_text(json.dumps(self._summary(trainer, pl_module), indent=2) + "\n")

    def _summary(self, trainer: Any, pl_module: pl.LightningModule) -> dict[str, Any]:
        counts = dict(trainer.datamodule.counts)
        seconds = {**counts.pop("seconds"), "train": self._train, "sample": spent(trainer, SampleGrid)}
        if any(isinstance(callback, Evaluate) for callback in trainer.callbacks):
            seconds["evaluate"] = spent(trainer, Evaluate)
        seconds["total"] = time.time() - psutil.Process().create_time()
        rows = read_rows(metrics_path(trainer), trainer.global_step)[-LAST_STEPS:]
        losses = {name: [float(row[name]) for row in rows if row[name]] for name in LOSSES}
        return {
            "seconds": {name: round(value, 2) for name, value in seconds.items()},
            "steps": trainer.global_step,
            "resumed_from": self._resumed_from,
            "steps_per_second": round(self._steps / self._train, 3) if self._steps else None,
            "samples_per_second": round(self._steps * self._samples / self._train, 3) if self._steps else None,
            "peak_memory_mb": round(peak_memory_mb(trainer.strategy.root_device)),
            **counts,
            "final": {name: _mean(values) for name, values in losses.items()},
            "versions": {"dreambooth": __version__, "python": platform.python_version()}
            | {package: version(package) for package in PACKAGES},
            "seed": pl_module.seed,
            **_measured(Path(trainer.default_root_dir) / FOLDER / METRICS),
        }


def spent(trainer: Any, kind: type[SampleGrid | Evaluate]) -> float:
    """Seconds that the callbacks of a kind took in this process."""
    return sum(callback.seconds for callback in trainer.callbacks if isinstance(callback, kind))


def _measured(path: Path) -> dict[str, Any]:
    """``metrics``, ``best_step`` and ``stopped``, where the run was evaluated."""
    return json.loads(path.read_text()) if path.exists() else {}


def peak_memory_mb(device: torch.device) -> float:
    """The most memory this process has held so far, in MiB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _mean(values: list[float]) -> float | None:
    """The mean; None where there is none, since JSON has no word for it."""
    mean = sum(values) / len(values) if values else math.nan
    return mean if math.isfinite(mean) else None
