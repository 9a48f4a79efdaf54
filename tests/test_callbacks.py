"""Progress on a terminal and in a log, and the rows of metrics.csv."""

import io
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dreambooth.callbacks.metrics_csv import COLUMNS, MetricsCsv, Row
from dreambooth.callbacks.progress import Progress
from dreambooth.errors import UserError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def follow(progress: Progress, first: int, last: int) -> None:
    """What Lightning calls, for the steps after ``first`` of two micro-batches each."""
    trainer: Any = SimpleNamespace(global_step=first, max_steps=last, accumulate_grad_batches=2, world_size=3)
    progress.on_train_start(trainer, None)
    for batch in range(2 * (last - first)):
        trainer.global_step = first + (batch + 1) // 2
        progress.on_train_batch_end(trainer, None, {"loss": torch.tensor(0.25)}, {"index": [0, 1]}, batch)
    progress.on_train_end(trainer, None)


def test_a_log_gets_a_line_now_and_then(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with caplog.at_level(logging.INFO):
        follow(Progress(line_seconds=1000), 10, 40)
        assert len(caplog.messages) == 1
        assert caplog.messages[0].startswith("step 40/40, loss 0.5000, ")
        caplog.clear()
        follow(Progress(line_seconds=0), 10, 13)
    assert [line.split(",")[0] for line in caplog.messages] == [f"step {step}/13" for step in (11, 12, 13)]
    assert all(line.endswith(" left") for line in caplog.messages)
    for line in caplog.messages:  # two pictures, two micro-batches, three ranks
        steps, samples = (float(part.split()[0]) for part in line.split(", ")[2:4])
        assert samples == pytest.approx(12 * steps, rel=0.01, abs=0.2)
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


def test_a_terminal_gets_one_bar_that_begins_where_the_run_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    follow(Progress(refresh_seconds=0), 10, 14)
    bar = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert " 10/14 [" in bar
    assert " 14/14 [" in bar
    assert "loss=0.5000" in bar
    sys.stderr.seek(0)
    sys.stderr.truncate()
    quiet = Progress(refresh_seconds=0)
    quiet.disable()
    follow(quiet, 0, 3)
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


def test_a_full_disk_is_one_line() -> None:
    metrics = MetricsCsv()
    metrics._path = Path("/dev/full")
    metrics._pending = Row(3, dict.fromkeys(COLUMNS[1:-1], torch.tensor(1.0)), 0.1, 4, None)
    with pytest.raises(UserError, match=r"^cannot write /dev/full: No space left on device; make room and type the"):
        metrics._flush()
