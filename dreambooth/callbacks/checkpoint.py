"""What a killed run needs to go on."""

import logging
from pathlib import Path

import pytorch_lightning as pl

from dreambooth.errors import UserError
from dreambooth.files import remove, sweep
from dreambooth.parallel.checkpoint import save
from dreambooth.parallel.tensors import read_notes

log = logging.getLogger(__name__)
FOLDER = "checkpoints"  # in the run folder, which is the trainer's default_root_dir


class Checkpoint(pl.callbacks.Checkpoint):
    """Saves ``checkpoints/step_000100.ckpt`` every ``every_n_train_steps`` and at the end.

    Keeps the ``save_last_k`` newest (-1: all). Each holds what learns, its averages, the optimizer, the schedule and
    the step by name (``parallel/checkpoint.py``), so that another strategy or number of ranks can go on from it, and no
    frozen weights. (Lightning runs callbacks of this base class after all others.)
    """

    def __init__(self, every_n_train_steps: int = 100, save_last_k: int = 1) -> None:
        self.every_n_train_steps, self.save_last_k = every_n_train_steps, save_last_k
        self.saved: int | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.is_global_zero:  # a kill leaves gigabytes under temporary names
            for name in ("", "samples", FOLDER):
                sweep(Path(trainer.default_root_dir) / name, shared=False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.saved = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step % self.every_n_train_steps == 0 or trainer.global_step == trainer.max_steps:
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Save this step, once; every rank calls it."""
        if self.saved == trainer.global_step:
            return
        self.saved = trainer.global_step
        folder = Path(trainer.default_root_dir) / FOLDER
        save(trainer, trainer.lightning_module, folder / f"step_{self.saved:06d}.ckpt")
        if self.save_last_k > 0 and trainer.is_global_zero:
            # A newer one is damaged, or this run would have gone on from it: never in the place of this one.
            own = [path for path in checkpoints(folder) if int(path.stem[5:]) <= self.saved]
            for old in own[: -self.save_last_k]:
                remove(old)
                if old.exists():
                    log.warning("%s cannot be removed: it stays beside the newer ones", old)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    found = [path for path in folder.glob("step_*.ckpt") if path.stem[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.stem[5:]))


def newest(folder: Path, base: str) -> Path | None:
    """The newest readable checkpoint of ``folder``, None without one; says which ones it had to pass over.

    Raises UserError when it was trained from another model than the one of fingerprint ``base``, or none is whole.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            stored = read_notes(path)["base"]
        except Exception as error:  # whatever a damaged file makes of the reader
            log.warning("%s is damaged (%s): it is passed over", path, type(error).__name__)
            continue
        if stored != base:
            raise UserError(
                f"{path} was trained from another model ({stored}) than model.from_pretrained ({base}): "
                "type that model, or resume=false to begin afresh"
            )
        return path
    if found:
        raise UserError(
            f"no checkpoint in {folder} can be read: delete the folder, or type resume=false to begin afresh"
        )
    return None
