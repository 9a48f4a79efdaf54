"""adapter/ and pipeline/: what was learned, for others to draw with."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from dreambooth.files import atomic

ADAPTER, PIPELINE = "adapter", "pipeline"  # in the run folder


class Export(pl.Callback):
    """Write what was learned when training ends, with the averaged weights where they are kept.

    What is a file of its own beside the base goes to ``adapter/``. A whole ``pipeline/`` is written of all else, if
    ``merged``, and if other noise levels were learned than the base's: no adapter says these.
    """

    def __init__(self, merged: bool = False) -> None:
        self.merged = merged

    # Not on_train_end: Lightning skips it for a run that was killed after its last step and has nothing to train.
    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        folder, tuning = Path(trainer.default_root_dir), pl_module.tuning
        if tuning.saves_adapter:
            with pl_module.averaged():
                if trainer.is_global_zero:
                    with atomic(folder / ADAPTER) as temporary:
                        tuning.save(temporary)
        levels = pl_module.objective.scheduler
        if self.merged or not tuning.saves_adapter or levels not in (None, pl_module.family.scheduler):
            with pl_module.finished():
                if trainer.is_global_zero:
                    pl_module.family.save(folder / PIPELINE)
