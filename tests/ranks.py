"""Run as a program by test_distributed.py: two ranks of batch 1, healthy, with a picture of nan, told to stop."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from dreambooth.callbacks.checkpoint import Checkpoint
from dreambooth.callbacks.ema import Ema
from dreambooth.callbacks.nan_guard import NanGuard
from dreambooth.callbacks.preemption import Preemption
from dreambooth.errors import UserError
from tests.steps import module_of, run


class Told(pl.Callback):
    """USR1 in the middle of the third step of the second rank, and of no other."""

    def on_before_backward(self, trainer: Any, *_: object) -> None:
        if (trainer.global_rank, trainer.global_step) == (1, 2):
            os.kill(os.getpid(), signal.SIGUSR1)

    def on_train_batch_end(self, trainer: Any, *_: object) -> None:
        self.step = trainer.global_step


if __name__ == "__main__":
    model, folder = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    module = module_of(model)
    ranks = {"size": 1, "strategy": "ddp", "devices": 2, "gradient_clip_val": 1.0}
    callbacks = [Ema(0.5), Checkpoint(2)]
    trainer, rows = run(module, 3, callbacks=callbacks, enable_checkpointing=True, default_root_dir=folder, **ranks)
    guarded = module_of(model)
    try:
        run(guarded, 9, callbacks=[NanGuard(3)], poison="instance/3", **(ranks | {"accumulate_grad_batches": 3}))
    except UserError as error:
        (folder / f"rank{trainer.global_rank}.txt").write_text(str(error))
    weights = [weight.detach() for weight in module.learning()]
    torch.save({"rows": rows, "weights": weights}, folder / f"rank{trainer.global_rank}.pt")
    told = Told()
    try:
        callbacks = [told, Preemption(), Checkpoint(100)]
        run(
            module_of(model),
            9,
            callbacks=callbacks,
            enable_checkpointing=True,
            default_root_dir=folder / "told",
            **ranks,
        )
    except SystemExit as end:
        (folder / f"told{trainer.global_rank}.txt").write_text(f"{end.code} at {told.step}")
