"""metrics.csv: one row for every optimizer step, whatever happened on the way."""

import csv
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor

from dreambooth.callbacks.clock import training_clock
from dreambooth.callbacks.loggers import tell
from dreambooth.errors import UserError
from dreambooth.files import atomic
from dreambooth.module import LOSSES, QUARTERS

COLUMNS = ("step", *LOSSES, "lr", "grad_norm", *QUARTERS, "seconds")


class Row(NamedTuple):
    step: int
    metrics: dict[str, Tensor]
    seconds: float
    samples: int
    arrived: torch.cuda.Event | None


class MetricsCsv(pl.Callback):
    """Append each optimizer step's ``step_metrics`` of the module, and its seconds, to metrics.csv.

    On a CPU a row is in the file when its step ends. On a GPU it is written one step later: the values travel while the
    next step is computed, so that the GPU never waits, at the price that a kill loses one row. It is never a row that a
    checkpoint builds upon: saving one writes the row first. A run that goes on from step k drops the rows after k.
    The run's loggers are told every ``trainer.log_every_n_steps``-th row, and the pictures a second of all ranks.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._pending: Row | None = None
        self._trainer: pl.Trainer | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step, self._mark = trainer.global_step, training_clock(trainer)
        if trainer.is_global_zero:
            self._path, self._trainer = metrics_path(trainer), trainer
            rows = read_rows(self._path, trainer.global_step)
            with atomic(self._path) as temporary, temporary.open("w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([COLUMNS, *(row.values() for row in rows)])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        if self._path is None or trainer.global_step == self._step:
            return
        now = training_clock(trainer)
        arrived = torch.cuda.Event() if pl_module.device.type == "cuda" else None
        metrics = {name: value.to("cpu", non_blocking=True) for name, value in pl_module.step_metrics.items()}
        if arrived is not None:
            arrived.record()
        self._flush()
        self._pending = Row(trainer.global_step, metrics, now - self._mark, samples_per_step(trainer, batch), arrived)
        if arrived is None:
            self._flush()
        self._step, self._mark = trainer.global_step, now

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._flush()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._flush()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._flush()

    def _flush(self) -> None:
        row, self._pending = self._pending, None
        if row is None or self._path is None:
            return
        if row.arrived is not None:
            row.arrived.synchronize()
        numbers = {name: f"{value.item():.8g}" for name, value in row.metrics.items()}
        numbers |= {name: "" for name in QUARTERS if numbers[name] == "nan" and numbers["loss"] != "nan"}  # no example
        values = {**numbers, "step": row.step, "seconds": f"{row.seconds:.4f}"}
        try:
            with self._path.open("a", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow([values[name] for name in COLUMNS])
        except OSError as error:
            raise UserError(
                f"cannot write {self._path}: {error.strerror}; make room and type the command again"
            ) from error
        if self._trainer and row.step % self._trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            told = {f"train/{name}": float(value) for name, value in numbers.items() if value}
            tell(self._trainer, told | {"train/samples_per_second": row.samples / row.seconds}, row.step)


def samples_per_step(trainer: pl.Trainer, batch: Any) -> int:
    """How many pictures, of both roles, an optimizer step sees on all ranks, when each gets such batches.

    A pretraining's batch is a mere tick, whose pictures it draws itself, and does not say: 0.
    """
    known = len(batch["index"]) if isinstance(batch, dict) else 0
    return known * trainer.world_size * trainer.accumulate_grad_batches


def metrics_path(trainer: pl.Trainer) -> Path:
    """metrics.csv of the run folder, which is the trainer's ``default_root_dir``."""
    return Path(trainer.default_root_dir) / "metrics.csv"


def read_rows(path: Path, last_step: int) -> list[dict[str, str]]:
    """Rows of the steps up to ``last_step``; what a killed run left behind after it, or half-written, is left out."""
    if not path.exists():
        return []
    whole = path.read_text().rpartition("\n")[0].splitlines()
    if whole and whole[0] != ",".join(COLUMNS):
        raise UserError(f"{path} has other columns than {','.join(COLUMNS)}: move it away, or type resume=false")
    rows = [row for row in csv.DictReader(whole) if None not in row and None not in row.values()]
    return [row for row in rows if row["step"].isdigit() and int(row["step"]) <= last_step]
