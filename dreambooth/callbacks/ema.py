"""Moving average of the weights that learn."""

from typing import Any

import pytorch_lightning as pl


class Ema(pl.Callback):
    """Keeps the average ``a ← d·a + (1 - d)·w`` of what learns after every step; ``decay`` null keeps none.

    d rises as min(decay, (1 + step) / (10 + step)), so that a short run's average leaves the base behind (the rule of
    tf.train.ExponentialMovingAverage and diffusers' EMAModel). Each rank averages what it holds of the weights
    (``parallel/layout.py``), and checkpoints have them whole; ``module.averaged()`` puts them in place.
    """

    def __init__(self, decay: float | None = None) -> None:
        self.decay = decay
        self.step = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.decay is not None:
            pl_module.layout.start_averages()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: object) -> None:
        if self.decay is None or trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        pl_module.layout.update_averages(decay)
