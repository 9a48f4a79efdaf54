"""One training stage of the pocket world on Lightning: checkpointed, resumed, a function of (seed, step)."""

import logging
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from dreambooth.callbacks.progress import Progress
from dreambooth.files import atomic
from dreambooth.noise import generator, seed_of
from dreambooth.tasks import quieten

log = logging.getLogger(__name__)


class Stage(pl.LightningModule, ABC):
    """AdamW with warm-up and cosine decay around a loss that draws its own batch from (seed, step)."""

    def __init__(self, name: str, steps: int, lr: float, seed: int, weight_decay: float = 0.01):
        super().__init__()
        self.name, self.steps, self.lr, self.seed, self.weight_decay = name, steps, lr, seed, weight_decay

    @abstractmethod
    def loss(self, g: torch.Generator) -> Tensor:
        """The scalar loss of a batch that is drawn with ``g``."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        torch.manual_seed(seed_of(self.seed, self.global_step, self.name, "dropout"))
        return self.loss(generator(self.seed, self.global_step, self.name))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(
            [p for p in self.parameters() if p.requires_grad],
            lr=self.lr,
            weight_decay=self.weight_decay,
            betas=(0.9, 0.98),
        )

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _Ticks(IterableDataset):
    """An endless stream of nothing: a stage draws its own batches, and Lightning has no place in an epoch to lose."""

    def __iter__(self) -> Iterator[Tensor]:
        return repeat(torch.zeros(()))


def fit(stage: Stage, folder: Path, every_n_train_steps: int = 250, until: int | None = None) -> None:
    """Train ``stage`` to its last step (or ``until`` that one), going on from the newest checkpoint in ``folder``."""
    quieten()
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # all stages share one
    last = folder / f"{stage.name}.ckpt"
    log.info("%s: %s", stage.name, "going on" if last.exists() else "from the beginning")
    checkpoints = ModelCheckpoint(
        folder, filename=stage.name, every_n_train_steps=every_n_train_steps, enable_version_counter=False
    )
    trainer = pl.Trainer(
        max_steps=until or stage.steps,
        accelerator="auto",
        devices=1,
        logger=False,
        callbacks=[checkpoints, Progress()],
        enable_model_summary=False,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
    )
    trainer.fit(
        stage, DataLoader(_Ticks(), batch_size=None), ckpt_path=last if last.exists() else None, weights_only=True
    )
    with atomic(last) as path:
        trainer.save_checkpoint(path)
