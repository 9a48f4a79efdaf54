"""Trainings over several ranks, each rank a process of its own that can be killed.

The processes are forked from a server that has imported everything, so that a pair of them starts in a second.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DeepSpeedStrategy

from dreambooth.callbacks.checkpoint import Checkpoint, newest
from dreambooth.callbacks.ema import Ema
from dreambooth.callbacks.export import Export
from dreambooth.callbacks.preemption import Preemption
from dreambooth.parallel.fsdp import FsdpStrategy
from dreambooth.parallel.zero import ZeroStrategy
from dreambooth.tuning.full import Full
from dreambooth.tuning.lora import Lora
from dreambooth.tuning.pivotal import Pivotal
from dreambooth.tuning.textual_inversion import TextualInversion
from tests.steps import CONSTANT, PROMPTS, module_of, run

LITTLE: dict[str, Any] = {"rank": 2, "alpha": 3, "seed": 5, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
LORA = partial(Lora, **LITTLE | {"target_modules": [*LITTLE["target_modules"], "q_proj", "v_proj"]})
WORD = {"instance_prompt": PROMPTS["instance"], "class_prompt": PROMPTS["regularization"], "embedding_lr": 5e-3}

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.strategies"])


class CpuZero(ZeroStrategy):
    """ZeRO on a CPU, which Lightning refuses by a check of the accelerator; without the operator it would compile."""

    gpus_only = False

    def setup_environment(self) -> None:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.parallel_devices = [torch.device("cpu", index) for index in range(len(self.parallel_devices))]
        super(DeepSpeedStrategy, self).setup_environment()


STRATEGIES: dict[str, Any] = {
    "auto": lambda: "auto",
    "ddp": lambda: "ddp",
    "fsdp": FsdpStrategy,
    "fsdp_hybrid": partial(FsdpStrategy, replicate=2),
    "deepspeed_1": partial(CpuZero, 1),
    "deepspeed_2": partial(CpuZero, 2),
    "deepspeed_2_offload": partial(CpuZero, 2, offload=True),
    "deepspeed_3": partial(CpuZero, 3),
    "deepspeed_3_offload": partial(CpuZero, 3, offload=True),
}

TUNINGS: dict[str, Any] = {
    "full": Full,
    "lora": LORA,
    "dora": partial(LORA, use_dora=True),
    "textual_inversion": lambda family, **_: TextualInversion(family, **WORD),
    "pivotal": lambda family, **_: Pivotal(family, **WORD, **LITTLE, embedding_steps=None),
    "pivotal_in_turn": lambda family, **_: Pivotal(family, **WORD, **LITTLE, embedding_steps=3, together=False),
}


@dataclass(frozen=True)
class Job:
    """A training in a run folder, that goes on where the newest checkpoint stands."""

    model: Path
    folder: Path
    strategy: str = "auto"
    ranks: int = 1
    steps: int = 3
    size: int = 2
    accumulate: int = 1
    prior: bool = True
    ema: float | None = 0.5
    clip: float | None = 1.0
    poison: str = ""
    tuning: str = "full"
    precision: str = "32-true"
    pause: float = 0.0
    told: int | None = None  # the step in which the second rank gets USR1
    photos: Path | None = None  # encoded in every step; else latents are made up
    module: dict[str, Any] = field(default_factory=dict)
    more: tuple[pl.Callback, ...] = ()  # before the export

    def __call__(self) -> Any:
        """Run it as this process's rank; the module."""
        module = make_module(self)
        resume = newest(self.folder / "checkpoints", module.base)
        run(
            module,
            self.steps,
            size=self.size,
            prior=self.prior,
            poison=self.poison,
            photos=self.photos,
            callbacks=[
                Ema(self.ema),
                Record(self),
                Told(self.told),
                Preemption(),
                *self.more,
                Export(merged=True),
                Checkpoint(2, save_last_k=-1),
            ],
            resume=resume,
            enable_checkpointing=True,
            default_root_dir=self.folder,
            strategy=STRATEGIES[self.strategy](),
            devices=self.ranks,
            accumulate_grad_batches=self.accumulate,
            gradient_clip_val=self.clip,
            precision=self.precision,
        )
        return module


def make_module(job: Job) -> Any:
    """The module of a job, at a rate that warms up."""
    sched = CONSTANT | {"name": "constant_with_warmup", "warmup_steps": 3}
    return module_of(job.model, sched=sched, tuning=TUNINGS[job.tuning], **job.module)


class Record(pl.Callback):
    """Writes each step's metrics to ``rows.jsonl`` as it ends, and then waits, so that a killer is in time."""

    def __init__(self, job: Job) -> None:
        self.job, self.step = job, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: object) -> None:
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        if trainer.is_global_zero:
            row = {name: float(value) for name, value in pl_module.step_metrics.items()}
            with (self.job.folder / "rows.jsonl").open("a") as file:
                file.write(json.dumps({"step": self.step, **row}) + "\n")
        time.sleep(self.job.pause)


class Told(pl.Callback):
    """USR1 to the second rank in the middle of a step, and to no other."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_before_backward(self, trainer: Any, *_: object) -> None:
        if (trainer.global_rank, trainer.global_step + 1) == (1, self.step):
            os.kill(os.getpid(), signal.SIGUSR1)


def rows(folder: Path) -> dict[int, dict[str, float]]:
    """What ``Record`` wrote, by step; a repeated step's last row counts."""
    found = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return {row.pop("step"): row for row in found}


def start(job: Job) -> list[Any]:
    """The processes of a job's ranks, begun."""
    job.folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [PROCESSES.Process(target=_rank, args=(job, rank, port), daemon=True) for rank in range(job.ranks)]
    for process in processes:
        process.start()
    return processes


def finish(job: Job, limit: float = 120) -> None:
    """Run a job to its end; what a rank said when it failed is the failure."""
    processes, deadline = start(job), time.monotonic() + limit
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * job.ranks, f"{codes}\n" + "".join(
        path.read_text() for path in sorted(job.folder.glob("rank*.log"))
    )


def kill_after(job: Job, name: str, limit: float = 120) -> None:
    """Start a job and kill all its ranks with SIGKILL as soon as a file is there."""
    processes, deadline = start(job), time.monotonic() + limit
    while not (job.folder / name).exists():
        logs = "".join(path.read_text() for path in sorted(job.folder.glob("rank*.log")))
        assert all(process.is_alive() for process in processes), logs
        assert time.monotonic() < deadline, logs
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.join()


def _rank(job: Job, rank: int, port: int) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(job.ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    log = (job.folder / f"rank{rank}.log").open("a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    try:
        job()
    except SystemExit as end:
        os._exit(end.code)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)
