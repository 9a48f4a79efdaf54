"""Seconds that two ranks on this machine take to save and read our checkpoint, beside the folder that DeepSpeed writes.

    python -m benchmarks.checkpoint         # a UNet of 38 million parameters with AdamW; 2 GB of memory

Ours (but for ddp) and DeepSpeed's have a file of each rank; DeepSpeed's are pickled, so no run reads them, and fit as
many ranks only.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from diffusers import UNet2DConditionModel

from dreambooth.parallel import checkpoint
from tests.steps import module_of, run
from tests.strategies import STRATEGIES
from tests.tiny import build_tiny_sd

COMPARED = ("ddp", "fsdp", "deepspeed_1", "deepspeed_2", "deepspeed_3")
WIDTHS = (96, 192, 384)
SAVED_BY_DEEPSPEED, READ_BY_DEEPSPEED = "saved by DeepSpeed", "read by DeepSpeed"
COLUMNS = ("saved", SAVED_BY_DEEPSPEED, "read", READ_BY_DEEPSPEED)


class Timed(pl.Callback):
    """Once something was learned, saves and reads; the first rank prints how long each took."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        path = self.folder / "ours.ckpt"
        timed(trainer, "saved", lambda: checkpoint.save(trainer, pl_module, path))
        timed(trainer, "read", lambda: checkpoint.load(trainer, pl_module, path))
        engine: Any = trainer.strategy.model
        if hasattr(engine, "save_checkpoint"):
            theirs = str(self.folder / "theirs")
            timed(trainer, SAVED_BY_DEEPSPEED, lambda: engine.save_checkpoint(theirs, exclude_frozen_parameters=True))
            timed(trainer, READ_BY_DEEPSPEED, lambda: engine.load_checkpoint(theirs, load_module_strict=False))


def timed(trainer: pl.Trainer, name: str, work: Callable[[], Any]) -> None:
    """Do it on all ranks, with what is written on the disk at the end, and print the seconds."""
    trainer.strategy.barrier()
    begin = time.perf_counter()
    work()
    os.sync()
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        print(f"{name}: {time.perf_counter() - begin:.2f}", flush=True)


def build(folder: Path) -> None:
    """A model folder whose UNet is large enough to be timed."""
    build_tiny_sd(folder)
    small = UNet2DConditionModel.load_config(folder / "unet")
    blocks = {"down_block_types": ["CrossAttnDownBlock2D"] * 3, "up_block_types": ["CrossAttnUpBlock2D"] * 3}
    large = UNet2DConditionModel.from_config({**small, **blocks, "block_out_channels": WIDTHS, "norm_num_groups": 32})
    print(f"{large.num_parameters() / 1e6:.0f} million parameters", flush=True)
    large.save_pretrained(folder / "unet")


def rank(strategy: str, folder: Path) -> None:
    """One of the two."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    module = module_of(folder / "model")
    run(
        module,
        1,
        size=1,
        callbacks=[Timed(folder / strategy)],
        strategy=STRATEGIES[strategy](),
        devices=2,
        default_root_dir=folder,
    )


def start(strategy: str, folder: Path) -> str:
    """Both, and what the first one printed."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    command = [sys.executable, "-m", "benchmarks.checkpoint", strategy, str(folder)]
    shared["DS_ACCELERATOR"] = "cpu"
    second = subprocess.Popen(command, env=shared | {"LOCAL_RANK": "1"}, stdout=subprocess.DEVNULL)
    first = subprocess.run(command, env=shared | {"LOCAL_RANK": "0"}, stdout=subprocess.PIPE, text=True, check=True)
    second.wait()
    return first.stdout


if __name__ == "__main__":
    if len(sys.argv) > 1:
        rank(sys.argv[1], Path(sys.argv[2]))
        sys.exit()
    with tempfile.TemporaryDirectory() as place:
        build(Path(place) / "model")
        print("| | " + " | ".join(f"{name}, s" for name in COLUMNS) + " |\n" + "|---" * (1 + len(COLUMNS)) + "|")
        for name in COMPARED:
            told = dict(line.rsplit(": ", 1) for line in start(name, Path(place)).splitlines() if ": " in line)
            print(f"| `{name}` | " + " | ".join(told.get(column, "-") for column in COLUMNS) + " |")
