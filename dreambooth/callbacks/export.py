"""pipeline/: what was learned, as a diffusers folder."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from dreambooth.files import sweep


class Export(pl.Callback):
    """Write ``pipeline/`` when training ends, with the averaged weights where they are kept.

    A run killed after its last step has nothing left to train when it goes on: Lightning then skips ``on_train_end``,
    and the export happens in ``on_fit_end``.
    """

    def __init__(self) -> None:
        self._done = False

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if trainer.is_global_zero:  # a kill in the middle of an export leaves gigabytes under a temporary name
            sweep(Path(trainer.default_root_dir))
            sweep(Path(trainer.default_root_dir) / "samples")

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero and not self._done:
            with pl_module.averaged():
                pl_module.family.save(Path(trainer.default_root_dir) / "pipeline")
        self._done = True

    on_fit_end = on_train_end
