"""A rank that dies while folders are filled: the others stop and name it; the next run ends with the same bytes."""

import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy

from dreambooth import compose, slurm
from dreambooth.parallel import patience
from dreambooth.parallel.fsdp import FsdpStrategy
from dreambooth.parallel.layout import Sharded
from dreambooth.parallel.watch import read, watched, watching
from dreambooth.tasks import prepare
from tests.processes import FORK_WARNING, start
from tests.tiny import RESOLUTION

LAUNCH = Path(__file__).resolve().parents[1] / "launch.py"
DRAWN = ["model.data.num_reg_images=160", "model.data.num_images_per_prompt=1", "model.data.sampler.inference_steps=2"]
ENCODED = ["model.with_prior_preservation=false", "model.data.center_crop=false", "model.data.cached_variants=60"]


def settings(model: Path, photos: Path, folder: Path, *more: str) -> list[str]:
    """``task=prepare`` into one folder."""
    data = {
        "instance_dir": photos,
        "instance_prompt": "sks",
        "regularization_prompt": "dog",
        "regularization_dir": folder / "set",
        "cached_instance_dir": folder / "set",
        "cached_reg_dir": folder / "latents",
        "resolution": RESOLUTION,
    }
    words = [f"model.data.{key}={value}" for key, value in data.items()]
    usual = ["task=prepare", f"model.from_pretrained={model}", f"hydra.run.dir={folder / 'run'}"]
    return [*usual, *words, "trainer.accelerator=cpu", *more]


def files(folder: Path) -> dict[str, bytes]:
    """What was made, by name."""
    return {path.name: path.read_bytes() for path in folder.rglob("[!.]*") if path.suffix in (".png", ".pt", ".json")}


def rank_of(process: psutil.Process) -> str:
    return process.environ().get("LOCAL_RANK", "0")


CASES = [
    pytest.param(DRAWN, 1, "python", id="drawing"),
    pytest.param(ENCODED, 0, "python", id="encoding"),
    pytest.param(DRAWN, 0, "torchrun", id="drawing under torchrun"),
    pytest.param(ENCODED, 1, "torchrun", id="encoding under torchrun"),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("work", "victim", "launcher"), CASES)
def test_a_rank_that_dies_ends_the_others(
    work: list[str], victim: int, launcher: str, tiny_sd: Path, photos: Path, tmp_path: Path
) -> None:
    """SIGKILL to one of two: of which the first has started the second, or which torchrun has started."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    prepare(compose(settings(tiny_sd, photos, whole, *work)))
    expected = files(whole / "set")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if launcher == "torchrun" else []
    told = [*settings(tiny_sd, photos, parts, *work), "trainer.devices=2", "strategy=ddp"]
    command = [sys.executable, *torchrun, str(LAUNCH), *told]
    env = os.environ | {"PYTHONPATH": str(LAUNCH.parent), "PYTHONWARNINGS": "ignore"}
    with (tmp_path / "err").open("w") as err:
        begun = subprocess.Popen(command, env=env, stdout=err, stderr=err)
    deadline = time.monotonic() + 120
    while len(files(parts / "set")) < 20:
        assert begun.poll() is None, (tmp_path / "err").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    launched = psutil.Process(begun.pid)
    ranks = {rank_of(process): process for process in [launched, *launched.children()][bool(torchrun) :]}
    ranks[str(victim)].send_signal(signal.SIGKILL)
    begun.wait(60)
    assert psutil.wait_procs(ranks.values(), 60)[1] == []
    assert begun.returncode == (-signal.SIGKILL if victim == 0 and not torchrun else 1)
    assert len(files(parts / "set")) < len(expected)
    log = parts / "run" / "ranks" / f"rank_{victim}.log"
    said = [line for line in (tmp_path / "err").read_text().splitlines() if "dreambooth: " in line]
    if not torchrun or said:  # torchrun ends the others itself, perhaps before they can say why
        assert len(said) == 1, said
        assert f"rank {victim} (" in said[0]
        assert f"its log is {log}" in said[0]
        assert ("was ended by SIGKILL" if victim and not torchrun else "is gone without a word") in log.read_text()

    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, shlex.join(command) + done.stderr
    assert files(parts / "set") == expected
    assert not (parts / "run").exists()


def two_of(folder: Path, rank: int, port: int, strategy: Any = "ddp") -> pl.Trainer:
    """The trainer of one of two ranks, in the environment that torchrun gives it."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stderr = (folder / f"err{rank}").open("w")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    two = pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, default_root_dir=folder, **quiet)
    two.strategy.setup_environment()
    return two


def run_rank(folder: Path, rank: int, port: int) -> None:
    """One of two ranks: the second fails, the first is busy for long."""
    two = two_of(folder, rank, port)
    for _ in range(50):  # one may begin anew while the other clears up
        with watching(two):
            two.strategy.barrier()
    assert not (folder / "ranks" / f"rank_{rank}.log").exists()
    with watching(two):
        if rank == 1:
            raise RuntimeError("no space left")
        time.sleep(100)


def run_told(folder: Path, rank: int, port: int) -> None:
    """One of two ranks: the second is told to go on later, the first waits for it where no signal is heard."""
    two = two_of(folder, rank, port)
    os.environ |= {"SLURM_JOB_ID": "71", "SLURM_JOB_NAME": "train", "PATH": f"{folder}:{os.environ['PATH']}"}
    slurm.PATIENCE = 2.0
    with slurm.requeued(True), watching(two):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        two.strategy.barrier()


@pytest.mark.slow
@pytest.mark.filterwarnings(FORK_WARNING)
def test_a_rank_that_is_told_to_go_on_later_has_the_first_one_ask_for_it(tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/told\n')
    (tmp_path / "scontrol").chmod(0o755)
    port = random.SystemRandom().randint(20000, 60000)
    both = [start(run_told, tmp_path, rank, port) for rank in range(2)]
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [143, 143]
    assert (tmp_path / "told").read_text() == "requeue 71\n"


def test_a_rank_that_ends_at_once_is_still_heard() -> None:
    """Its last words may come with its first."""
    here, there = socket.socketpair()
    with here, there:
        there.sendall(b"token\t1\trank\tpath\n2 why\n")
        assert read(here) == "token\t1\trank\tpath"
        assert read(here) == "2 why"
        there.close()
        assert read(here) is None


@pytest.mark.slow
@pytest.mark.filterwarnings(FORK_WARNING)
def test_what_a_rank_died_of_is_in_its_log_and_in_the_line_of_the_others(tmp_path: Path) -> None:
    port = random.SystemRandom().randint(20000, 60000)
    both = [start(run_rank, tmp_path, rank, port) for rank in range(2)]
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [1, 1]
    log = tmp_path / "ranks" / "rank_1.log"
    assert log.read_text().endswith("RuntimeError: no space left\n")
    (line,) = (line for line in (tmp_path / "err0").read_text().splitlines() if "dreambooth: " in line)
    assert f"ended with RuntimeError: no space left; its log is {log}" in line


def run_slow(folder: Path, rank: int, port: int, make: Any) -> None:
    """One of two ranks, which torch gives a second to meet; the first then takes three before it goes on."""
    strategy = make()
    strategy._timeout = timedelta(seconds=1)
    two = two_of(folder, rank, port, strategy)
    watched(lambda self: time.sleep(0 if rank else 3) or two.strategy.barrier())(SimpleNamespace(trainer=two))
    time.sleep(0 if rank else 3)
    assert two.strategy.broadcast(rank) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings(FORK_WARNING)
@pytest.mark.parametrize("make", [FsdpStrategy, pytest.param(DDPStrategy, marks=pytest.mark.exhaustive)])
def test_a_rank_that_is_merely_slow_is_waited_for(make: Any, tmp_path: Path) -> None:
    """Longer than the limit of the process group that the strategy made, while folders are filled and afterwards."""
    port = random.SystemRandom().randint(20000, 60000)
    both = [start(run_slow, tmp_path, rank, port, make) for rank in range(2)]
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0], (tmp_path / "err1").read_text()


def test_while_the_first_rank_draws_the_others_wait_among_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the next step, in a group of the strategy's own (hybrid shards, DeepSpeed) that has torch's limit."""
    said: list[str] = []
    strategy = SimpleNamespace(barrier=lambda: said.append("met"))
    trainer = SimpleNamespace(is_global_zero=False, strategy=strategy)
    monkeypatch.setattr(Sharded, "named", lambda self: {})
    with Sharded(SimpleNamespace(trainer=trainer, learned={}, family=SimpleNamespace(networks={}))).whole():
        assert not said
    assert said == ["met"]


def launch(folder: Path) -> None:
    """A process that has launched another, which waits for ever, and dies."""
    patience.LOOK, parent = 0.1, os.getpid()
    if child := os.fork():
        (folder / "child").write_text(str(child))
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stderr = (folder / "err").open("w")
    patience.follow(parent, "rank 1")


@pytest.mark.filterwarnings(FORK_WARNING)
def test_a_rank_ends_with_the_process_that_launched_it(tmp_path: Path) -> None:
    start(launch, tmp_path).join(20)
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 20
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    line = "dreambooth: rank 1 ends, as the process that launched it is gone\n"
    assert (tmp_path / "err").read_text() == line


@pytest.mark.parametrize(("world", "local", "launcher", "follows"), [(2, 1, "x", 1), (2, 1, None, 0), (2, 0, "x", 0)])
def test_only_what_lightning_launched_follows_it(
    world: int, local: int, launcher: str | None, follows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Any] = []
    monkeypatch.setattr(patience.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(patience.dist, "set_timeout", begun.append, raising=False)
    monkeypatch.setattr(patience.threading, "Thread", lambda **how: SimpleNamespace(start=lambda: begun.append(how)))
    strategy = SimpleNamespace(launcher=launcher, broadcast=lambda first: first)
    patience.wait_long(SimpleNamespace(world_size=world, local_rank=local, global_rank=local, strategy=strategy))
    assert begun[0] == timedelta(days=1)
    assert len(begun) == 1 + follows
