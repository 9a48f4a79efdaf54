"""What the run's loggers are told, beside the files of the run folder."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger


def weights_and_biases(**settings: Any) -> "partial[WandbLogger]":
    """Lightning's logger for W&B, still to be given the run folder; ModuleNotFoundError at once without its package."""
    import wandb  # noqa: F401

    return partial(WandbLogger, **settings)


def tell(trainer: pl.Trainer, values: Mapping[str, float | None], step: int) -> None:
    """Numbers of a step to every logger; what is undefined is left out."""
    known = {name: value for name, value in values.items() if value is not None}
    for logger in trainer.loggers:
        logger.log_metrics(known, step)


def show(trainer: pl.Trainer, name: str, picture: Image.Image, step: int) -> None:
    """A picture of a step to every logger that takes pictures."""
    for logger in trainer.loggers:
        one: Any = logger
        if isinstance(logger, TensorBoardLogger):
            one.experiment.add_image(name, np.array(picture), step, dataformats="HWC")
        elif hasattr(logger, "log_image"):
            one.log_image(name, [picture], step)
