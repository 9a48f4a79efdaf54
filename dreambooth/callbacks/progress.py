"""How far the training is and how long it will take."""

import logging
import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from tqdm import tqdm

from dreambooth.callbacks.metrics_csv import samples_per_step

log = logging.getLogger(__name__)


class Progress(ProgressBar):
    """One bar over the optimizer steps on a terminal; elsewhere a line every ``line_seconds`` seconds.

    Lightning's own bar counts batches of an epoch, and an endless loader has no epoch to end. The loss is read every
    ``refresh_seconds`` seconds at most, since reading it makes a GPU wait.
    """

    def __init__(self, refresh_seconds: float = 1.0, line_seconds: float = 30.0) -> None:
        super().__init__()
        self._terminal = sys.stderr.isatty()
        self._interval = refresh_seconds if self._terminal else line_seconds
        self._enabled, self._bar = True, None

    def disable(self) -> None:
        """Called by Lightning on every rank but the first."""
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first, self._began = trainer.global_step, time.perf_counter()
        self._shown, self._shown_at = self._first, self._began
        if self._enabled and self._terminal:
            self._bar = tqdm(total=trainer.max_steps, initial=self._first, desc="train", unit="step", leave=True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now, step = time.perf_counter(), trainer.global_step
        last = step == trainer.max_steps
        if not self._enabled or step == self._shown or not (last or now - self._shown_at >= self._interval):
            return
        self._shown, self._shown_at = step, now
        loss = float(outputs["loss"]) * trainer.accumulate_grad_batches
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self._bar.update(step - self._bar.n)
            return
        rate = (step - self._first) / (now - self._began)
        samples = rate * samples_per_step(trainer, batch)
        left = tqdm.format_interval((trainer.max_steps - step) / rate)
        shown = f"{rate:.2f} steps/s, {samples:.3g} samples/s" if samples else f"{rate:.2f} steps/s"
        log.info("step %d/%d, loss %.4f, %s, %s left", step, trainer.max_steps, loss, shown, left)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
