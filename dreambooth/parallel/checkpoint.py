"""One kind of checkpoint, by parameter name: written and read by any strategy, on any number of ranks."""

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from dreambooth.errors import UserError
from dreambooth.files import atomic, remove
from dreambooth.parallel import tensors

log = logging.getLogger(__name__)

FORMAT = 1


def save(trainer: Any, module: Any, path: Path) -> None:
    """Write all that a run needs to go on; all ranks call it at the end of the same step and write what they hold.

    One file where every rank holds all, which the first one writes; else a folder with a file of each.
    Raises UserError, on all ranks, when one cannot write.
    """
    notes: dict[str, Any] = {
        "format": FORMAT,
        "base": module.base,
        "global_step": trainer.global_step,
        "world": trainer.world_size,
        "global_size": global_size(trainer),
        "text_stopped_at": module.stopped_at,
        "strategy": type(trainer.strategy).__name__,
        "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "groups": module.layout.groups(),
        "data": trainer.datamodule.state_dict(),
        "precision": trainer.precision_plugin.state_dict(),
        "callbacks": {each.state_key: state for each in _callbacks(trainer) if (state := each.state_dict())},
    }
    for callback in _callbacks(trainer):
        callback.on_save_checkpoint(trainer, module, notes)
    failure: Exception | None = None
    try:
        if trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        failure = _refused(path, error)
    _agree(trainer, path, failure)
    try:
        with atomic(path) if trainer.is_global_zero else nullcontext() as temporary:
            _write(trainer, path, temporary, module.layout, notes)
            if temporary is not None and path.is_dir() != module.layout.sharded:
                remove(path)  # a damaged one of the same step, by another strategy
    except Exception as error:
        failure = error
    _agree(trainer, path, failure)


def _write(trainer: Any, path: Path, temporary: Path | None, layout: Any, notes: dict[str, Any]) -> None:
    """Write on all ranks, to ``temporary`` of the first one; where one cannot, all raise."""
    entries, written = layout.entries(), 0
    failure: Exception | None = None
    try:
        if temporary is not None and layout.sharded:
            temporary.mkdir()
    except OSError as error:
        failure = _refused(path, error)
    place = Path(trainer.strategy.broadcast(str(temporary)))
    try:
        if failure is None and (layout.sharded or temporary is not None):
            own = tensors.file_of(place, trainer.global_rank, trainer.world_size) if layout.sharded else place
            written = tensors.write(own, entries, notes)
    except OSError as error:
        failure = _refused(path, error)
    except Exception as error:  # out of memory, say: the others shall not wait for this rank
        failure = error
    _agree(trainer, path, failure)
    everyones = trainer.strategy.reduce(torch.tensor(written, device=trainer.strategy.root_device), reduce_op="sum")
    if everyones != (size := sum(entry.size for entry in entries)):
        raise RuntimeError(f"{path}: the ranks wrote {int(everyones)} of {size} bytes")


def _agree(trainer: Any, path: Path, failure: Exception | None) -> None:
    """All ranks go on; or all raise, each its own failure or that another one has one."""
    if not trainer.strategy.reduce_boolean_decision(failure is None):
        raise failure or UserError(f"cannot write {path}: the log of another rank says why")


def _refused(path: Path, error: OSError) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path}: its folder is not here: it was removed, or this machine does not share it")
    return UserError(f"cannot write {path}: {error.strerror}; make room or name another folder")


def same_batch(path: Path, size: int) -> None:
    """Raise UserError when the steps of a checkpoint saw another number of pictures of each role than ``size``."""
    seen = tensors.read_notes(path).get("global_size", size)
    if seen != size:
        raise UserError(
            f"{path}: its steps saw {seen} pictures of each role, these would see {size}: change "
            "model.micro_batch_size or trainer.accumulate_grad_batches with the number of ranks, or type resume=false"
        )


def load(trainer: Any, module: Any, path: Path) -> None:
    """Go on from a checkpoint, once the strategy has set up weights and optimizer; all ranks read it themselves.

    Whoever trains on asks ``same_batch`` before anything is written.
    Raises UserError: it is of another format, or holds parameters, averages or groups that this run has not.
    """
    try:
        notes = tensors.read_notes(path)
        weights, averages, states = (tensors.read(path, f"{name}/") for name in ("weights", "averages", "optimizer"))
    except FileNotFoundError:
        raise UserError(f"{path} is gone: a newer one took its place meanwhile; type the command again") from None
    if notes.get("format") != FORMAT:
        raise UserError(f"{path} has another format than this version reads: type resume=false to begin afresh")
    named = module.layout.named()
    if set(weights) != set(named) or (module.ema is not None and set(averages) != set(named)):
        raise UserError(
            f"{path} holds other parameters or averages than this run lets learn: type the settings that it was "
            "trained with, or resume=false to begin afresh"
        )
    if len(notes["groups"]) != len(module.layout.groups()):
        raise UserError(f"{path} has other groups of parameters than model.optim makes now: type resume=false")
    module.layout.set_weights(weights, averages)
    module.layout.set_states(states, notes["groups"])
    for config, state in zip(trainer.lr_scheduler_configs, notes["schedules"], strict=True):
        config.scheduler.load_state_dict(state)
    if (stopped := notes.get("text_stopped_at")) is not None:  # a share of all steps, of which there may be more now
        module.tuning.stop_text_encoder_at = stopped
    if trainer.datamodule is not None:
        trainer.datamodule.load_state_dict(notes["data"])
    trainer.precision_plugin.load_state_dict(notes["precision"])
    _count(trainer, notes["global_step"])
    for callback in _callbacks(trainer):
        callback.on_load_checkpoint(trainer, module, notes)
        if state := notes["callbacks"].get(callback.state_key):
            callback.load_state_dict(state)
    before = (notes["world"], notes["strategy"])
    if before != (now := (trainer.world_size, type(trainer.strategy).__name__)):
        log.info("going on with %d ranks of %s from a checkpoint of %d of %s", *now, *before)


class Resume(pl.Callback):
    """Goes on from a checkpoint before the first step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        load(trainer, pl_module, self.path)


def global_size(trainer: Any) -> int:
    """How many pictures of each role an optimizer step sees: a run keeps it, whatever the ranks."""
    return int(trainer.datamodule.micro_batch_size * trainer.world_size * trainer.accumulate_grad_batches)


def _callbacks(trainer: Any) -> list[pl.Callback]:
    return list(trainer.callbacks)


def _count(trainer: Any, step: int) -> None:
    """Set Lightning's counters to the end of an optimizer step, whatever number of batches makes one now."""
    loop = trainer.fit_loop.epoch_loop
    steps, batches = loop.automatic_optimization.optim_progress.optimizer.step.total, loop.batch_progress.total
    steps.ready = steps.completed = step
    batches.ready = batches.started = batches.processed = batches.completed = step * trainer.accumulate_grad_batches
