"""How long ranks wait for each other: for one that draws or is merely slow a day, for one that is gone not at all."""

import os
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
import torch.distributed as dist

PATIENCE = timedelta(days=1)
LOOK = 10.0  # seconds between two looks for the process that launched this one


def wait_long(trainer: pl.Trainer) -> None:
    """Have ranks that have met wait a day in what they do together, in place of torch's half an hour.

    Until they have met torch's limit stays: nothing else would notice a node that never comes. Afterwards a rank that
    dies is noticed otherwise. Gloo's connections break with it; where NCCL's do not, torchrun, srun and Lightning's
    launcher end the others. Only the launcher's own end is left, which its children look for by themselves.
    """
    if trainer.world_size == 1 or not dist.is_initialized():
        return
    # The public name is younger than the oldest torch that this project takes.
    set_timeout: Any = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    set_timeout(PATIENCE)
    launched = trainer.strategy.broadcast(trainer.strategy.launcher is not None)  # by the first process of each machine
    if launched and trainer.local_rank:
        who = f"rank {trainer.global_rank}" if trainer.local_rank == 1 else ""
        threading.Thread(target=follow, args=(os.getppid(), who), daemon=True).start()


def follow(parent: int, who: str) -> None:
    """End this process, even in a collective, soon after the one that launched it; ``who`` says so if it is named."""
    while os.getppid() == parent:
        time.sleep(LOOK)
    if who:
        print(f"dreambooth: {who} ends, as the process that launched it is gone", file=sys.stderr, flush=True)
    os._exit(1)
