"""Stop between two steps when told to, with nothing lost."""

import os
import signal
import threading
import time
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

from dreambooth import slurm
from dreambooth.callbacks.checkpoint import Checkpoint

SIGNALS = (*slurm.REQUEUE_SIGNALS, signal.SIGTERM, signal.SIGINT)
IMPATIENT = 1.0  # seconds: torchrun repeats the Ctrl-C that the terminal sent to all, at once


class Preemption(pl.Callback):
    """Ends the run between two optimizer steps once USR1, USR2, TERM or INT has come, after saving a checkpoint.

    The handler raises a flag and does nothing else, so it may come anywhere in a step. With several ranks every step
    ends with an all-reduce of one number that is read a step later: no rank waits for it, and all stop at the same step
    though each was told at another moment. Under SLURM, USR1, USR2 and a pre-emption also requeue the job
    (``requeue``). Another Ctrl-C, more than a second after the first, ends the run at once.

    Runs after all callbacks but the checkpoint: what is due at the last step is done before it. Before the first step
    and after the last one the handlers of ``slurm.requeued`` and ``tasks.ended_by_sigterm`` act, at once.
    """

    def __init__(self, requeue: bool = True) -> None:
        self.requeue = requeue
        self.raised: list[int] = []
        self._since = 0.0
        self._before: dict[int, Any] = {}
        self._vote: tuple[Tensor, torch.cuda.Event | None] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            self._before = {sign: signal.signal(sign, self._raise) for sign in SIGNALS}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._agreed(trainer):
            self._stop(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)
        self._restore()
        if self.raised:  # after the last boundary: from here on the handlers before ours see to it
            os.kill(os.getpid(), self.raised[0])

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore()

    def _raise(self, sign: int, frame: Any) -> None:
        if sign == signal.SIGINT and sign in self.raised and time.monotonic() - self._since > IMPATIENT:
            raise KeyboardInterrupt
        if not self.raised:
            self._since = time.monotonic()
        self.raised.append(sign)

    def _agreed(self, trainer: pl.Trainer) -> bool:
        """Whether to stop: alone, if the flag is up; with others, if any had it up at the end of the step before."""
        if trainer.world_size == 1:
            return bool(self.raised)
        last, device = self._vote, trainer.strategy.root_device
        vote = torch.full((), float(bool(self.raised)), device=device)
        dist.all_reduce(vote, dist.ReduceOp.MAX)
        arrived = None
        if device.type == "cuda":
            vote, arrived = vote.to("cpu", non_blocking=True), torch.cuda.Event()
            arrived.record()
        self._vote = (vote, arrived)
        if last is None:
            return False
        if last[1] is not None:
            last[1].synchronize()
        return bool(last[0])

    def _stop(self, trainer: pl.Trainer) -> None:
        """Save, requeue and leave, on all ranks; the others wait for the first one's word to SLURM."""
        self._save(trainer)
        come_back = trainer.strategy.reduce_boolean_decision(
            any(sign in slurm.REQUEUE_SIGNALS for sign in self.raised), all=False
        )
        if trainer.is_global_zero and self.requeue and slurm.in_job() and (come_back or slurm.preempted()):
            slurm.requeue()
        trainer.strategy.barrier()
        raise SystemExit(130 if signal.SIGINT in self.raised else 143)

    def _save(self, trainer: pl.Trainer) -> None:
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoint):
                callback.save(trainer)

    def _restore(self) -> None:
        for sign, handler in self._before.items():
            signal.signal(sign, handler)
        self._before = {}
