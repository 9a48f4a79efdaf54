"""A signal at any moment of a step loses no update and repeats none."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from dreambooth import compose, slurm
from dreambooth.callbacks.checkpoint import Checkpoint, newest
from dreambooth.callbacks.ema import Ema
from dreambooth.callbacks.preemption import Preemption
from dreambooth.errors import UserError
from tests.steps import module_of, run

STEPS, STRUCK = 4, 2  # of the run, and the step in which the signal comes


class Watch(pl.Callback):
    """For a step, calls ``seen`` with the number of each call or return, and its frame."""

    def __init__(self, seen: Callable[[int, Any], None]) -> None:
        self.seen, self.count = seen, 0

    def on_train_batch_start(self, trainer: Any, *_: object) -> None:
        sys.setprofile(self.event if trainer.global_step == STRUCK - 1 else None)

    def event(self, frame: Any, what: str, argument: object) -> None:
        self.seen(self.count, frame)
        self.count += 1


def train(model: Path, folder: Path, watch: Callable[[int, Any], None] | None = None, resume: bool = False) -> Any:
    """Four steps in ``folder``; the module, where the optimizer stepped, and the exit code if it ended early."""
    module, updates = module_of(model), []
    callbacks = [Ema(0.5), *([Watch(watch)] if watch else []), Preemption(), Checkpoint(100)]
    found = newest(folder / "checkpoints", module.base) if resume else None

    class Count(pl.Callback):
        def on_train_start(self, trainer: Any, *_: object) -> None:
            trainer.optimizers[0].register_step_post_hook(lambda *_: updates.append(trainer.global_step))

    options = {"enable_checkpointing": True, "default_root_dir": folder, "callbacks": [*callbacks, Count()]}
    try:
        run(module, STEPS, resume=found, **options)
    except SystemExit as end:
        updates.append(end.code)
    finally:
        sys.setprofile(None)
    return module, updates


def inside_optimizer(frame: Any) -> bool:
    while frame is not None:
        if "/torch/optim/" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


@pytest.mark.exhaustive
def test_a_signal_at_any_moment_of_a_step_loses_and_repeats_nothing(tiny_sd: Path, tmp_path: Path) -> None:
    """20 moments, 6 of them within the optimizer's step; weights, averages and updates are the undisturbed ones."""
    within: list[int] = []
    total = 0

    def note(number: int, frame: Any) -> None:
        nonlocal total
        total = number
        if inside_optimizer(frame):
            within.append(number)

    whole, updates = train(tiny_sd, tmp_path / "whole", note)
    assert len(updates) == STEPS
    moments = [total * part // 14 for part in range(14)] + [within[len(within) // 7 * part] for part in range(1, 7)]
    for moment in moments:

        def strike(number: int, frame: Any, moment: int = moment) -> None:
            if number == moment:
                os.kill(os.getpid(), signal.SIGTERM)

        folder = tmp_path / f"at{moment}"
        _, before = train(tiny_sd, folder, strike)
        assert before.pop() == 143, moment
        (kept,) = (folder / "checkpoints").iterdir()
        assert kept.name in ("step_000002.ckpt", "step_000003.ckpt")  # the latter when it came after the boundary
        parts, after = train(tiny_sd, folder, resume=True)
        assert len(before) + len(after) == STEPS
        for name, value in whole.state_dict().items():
            assert torch.equal(value, parts.state_dict()[name]), (moment, name)


def test_the_flag_is_down_again_after_the_fit(tiny_sd: Path, tmp_path: Path) -> None:
    before = [signal.getsignal(sign) for sign in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)]
    train(tiny_sd, tmp_path)
    assert [signal.getsignal(sign) for sign in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)] == before


def batch_job(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    """As in a job of two nodes with a task each, unless said otherwise."""
    usual = {"JOB_ID": "71", "JOB_NAME": "train", "NTASKS": "2", "NNODES": "2", "NTASKS_PER_NODE": "1", "STEP_ID": "0"}
    for name, value in {**usual, **variables}.items():
        monkeypatch.setenv(f"SLURM_{name}", value) if value else monkeypatch.delenv(f"SLURM_{name}", raising=False)


@pytest.mark.parametrize(
    ("variables", "overrides", "words"),
    [
        ({}, [], r"trainer\.num_nodes=1, but the job has 2 nodes: type trainer\.num_nodes=2"),
        ({"NTASKS_PER_NODE": "4"}, ["trainer.num_nodes=2"], r"4 tasks on each node: type trainer\.devices=4"),
        ({"NTASKS_PER_NODE": ""}, ["trainer.num_nodes=2"], r"--ntasks-per-node instead"),
        ({"STEP_ID": ""}, ["trainer.num_nodes=2"], r"type srun before the command"),
        ({}, ["trainer.num_nodes=2"], None),
        ({}, ["trainer.num_nodes=2", "trainer.devices=auto"], None),
        ({}, ["task=benchmark", "callbacks/evaluate=default"], None),  # each task trains subjects of its own
        ({"JOB_NAME": "bash"}, [], None),
    ],
)
def test_other_processes_than_slurm_started_are_refused(variables, overrides, words, monkeypatch) -> None:
    batch_job(monkeypatch, **variables)
    if words is None:
        compose(overrides)
        return
    with pytest.raises(UserError, match=words):
        compose(overrides)


def test_a_signal_before_there_is_anything_to_save_waits_and_one_after_the_end_is_not_heard(
    tmp_path: Path, monkeypatch
) -> None:
    batch_job(monkeypatch, PROCID="0")
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/told\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "_asked", [])
    before = {sign: signal.getsignal(sign) for sign in slurm.REQUEUE_SIGNALS}
    reached: list[str] = []

    def command() -> None:
        with slurm.patient():
            os.kill(os.getpid(), signal.SIGUSR1)
            reached.append("before")
            with slurm.requeued(True):
                reached.append("within")

    try:
        with pytest.raises(SystemExit, match="143"):
            command()
        os.kill(os.getpid(), signal.SIGUSR1)  # would end this very process
        with slurm.patient(), slurm.requeued(True):
            reached.append("again")
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
    assert reached == ["before", "again"]
    assert (tmp_path / "told").read_text() == "requeue 71\n"


def test_requeueing_is_asked_of_slurm_once_and_only_by_the_first_rank(tmp_path: Path, monkeypatch, caplog) -> None:
    """Outside the steps USR1 acts at once; scontrol is a program that writes down what it was told."""
    batch_job(monkeypatch, NTASKS="1", NNODES="1", ARRAY_JOB_ID="70", ARRAY_TASK_ID="3", PROCID="0")
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/told\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert threading.current_thread() is threading.main_thread()
    monkeypatch.setattr(slurm, "PATIENCE", 0)
    monkeypatch.setattr(slurm, "_asked", [])
    for rank, wanted in (("0", True), ("1", True)):
        monkeypatch.setenv("SLURM_PROCID", rank)
        with pytest.raises(SystemExit, match="143"), slurm.requeued(wanted):
            os.kill(os.getpid(), signal.SIGUSR1)
    assert (tmp_path / "told").read_text() == "requeue 70_3\n"
    monkeypatch.setattr(slurm, "_asked", [])
    scontrol.write_text("#!/bin/sh\necho 'Requeue disabled' >&2; exit 1\n")
    slurm.requeue()
    assert "job 70_3 was not requeued (Requeue disabled): submit it again" in caplog.text
