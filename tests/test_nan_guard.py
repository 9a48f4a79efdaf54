"""The guard against losses that are not finite."""

from pathlib import Path

import pytest

from dreambooth.callbacks.checkpoint import Checkpoint, newest
from dreambooth.callbacks.nan_guard import NanGuard
from dreambooth.errors import UserError
from dreambooth.parallel.tensors import read
from tests.steps import module_of, run


def test_stops_and_names_the_pictures(tiny_sd: Path, tmp_path: Path) -> None:
    """A bad picture in every step: the run ends within twice the patience, and what it saved is finite."""
    module = module_of(tiny_sd)
    with pytest.raises(UserError) as caught:
        run(
            module,
            50,
            size=5,
            poison="instance/3",
            callbacks=[NanGuard(4), Checkpoint(1)],
            default_root_dir=tmp_path,
            enable_checkpointing=True,
        )
    message = str(caught.value)
    assert "4 steps in a row" in message
    assert "instance/3:" in message
    assert "instance/2" not in message
    assert module.trainer.global_step == 4
    saved = newest(tmp_path / "checkpoints", module.base)
    assert saved is not None
    assert all(weight.isfinite().all() for weight in read(saved, "").values())


def test_lets_a_rare_one_pass_and_reads_rarely(tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bad step in five is skipped; a short run of nothing else is not called finished."""
    readings = []
    monkeypatch.setattr(
        NanGuard, "check", lambda self, allowed, real=NanGuard.check: (readings.append(1), real(self, allowed))
    )
    _, rows = run(module_of(tiny_sd), 20, size=1, poison="instance/3", callbacks=[NanGuard(4)])
    assert sum(row["loss"] != row["loss"] for row in rows) == 4
    assert len(readings) == 20 // 4 + 1
    with pytest.raises(UserError, match="2 steps in a row"):
        run(module_of(tiny_sd), 2, size=5, poison="instance/3", callbacks=[NanGuard(10)])
