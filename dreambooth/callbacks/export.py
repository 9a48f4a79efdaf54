"""pipeline/: what was learned, as a diffusers folder."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from dreambooth.files import sweep


class Export(pl.Callback):
    """Write ``pipeline/`` when training ends, with the averaged weights where they are kept."""

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if trainer.is_global_zero:  # a kill in the middle of an export leaves gigabytes under a temporary name
            sweep(Path(trainer.default_root_dir))
            sweep(Path(trainer.default_root_dir) / "samples")

    # Not on_train_end: Lightning skips it for a run that was killed after its last step and has nothing to train.
    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            with pl_module.averaged():
                pl_module.family.save(Path(trainer.default_root_dir) / "pipeline")
