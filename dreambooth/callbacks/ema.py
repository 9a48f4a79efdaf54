"""Moving average of the weights that learn."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn


class Ema(pl.Callback):
    """Keeps the average ``a ← d·a + (1 - d)·w`` of what learns after every step; ``decay`` null keeps none.

    d rises as min(decay, (1 + step) / (10 + step)), so that a short run's average leaves the base behind (the rule of
    tf.train.ExponentialMovingAverage and diffusers' EMAModel). The averages are parameters of the module, so they are
    moved, saved and resumed with it; ``module.averaged()`` puts them in place.
    """

    def __init__(self, decay: float | None = None) -> None:
        self.decay = decay
        self.step = 0

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if self.decay is not None:
            copies = [nn.Parameter(weight.detach().clone(), requires_grad=False) for weight in pl_module.learning()]
            pl_module.ema = nn.ParameterList(copies)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: object) -> None:
        if self.decay is None or trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        # what is frozen on the way keeps the average it had, and may be on another device
        pairs = zip(pl_module.ema, pl_module.learning(), strict=True)
        averages, weights = zip(*(pair for pair in pairs if pair[1].requires_grad), strict=True)
        torch._foreach_lerp_(list(averages), list(weights), 1 - decay)
