"""Two real processes over gloo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dreambooth.callbacks.checkpoint import newest
from dreambooth.callbacks.ema import Ema
from dreambooth.parallel.tensors import read
from tests.steps import module_of, run

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_two_ranks_of_batch_1_are_one_of_batch_2(tiny_sd: Path, tmp_path: Path) -> None:
    """Same noise, losses, step and averages; both ranks agree; a bad picture on one rank ends both and is named; so
    does a signal to one rank, at the same step."""
    subprocess.run(
        [sys.executable, str(ROOT / "tests/ranks.py"), str(tiny_sd), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        check=True,
        timeout=120,
    )
    one = module_of(tiny_sd)
    _, expected = run(one, 3, size=2, gradient_clip_val=1.0, callbacks=[Ema(0.5)])
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert repr(first["rows"]) == repr(second["rows"])  # a quarter of the noise levels without an example is NaN
    for row, other in zip(first["rows"], expected, strict=True):
        assert row == pytest.approx(other, rel=1e-4, nan_ok=True)
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))
    torch.testing.assert_close(first["weights"], [weight.detach() for weight in one.learning()], atol=2e-4, rtol=0)
    saved = newest(tmp_path / "checkpoints", one.base)
    assert saved is not None
    assert saved.name == "step_000003.ckpt"
    averages = dict(zip(one.layout.named(), [average.detach() for average in one.ema], strict=True))
    torch.testing.assert_close(read(saved, "averages/"), averages, atol=2e-4, rtol=0)
    assert (tmp_path / "rank0.txt").read_text() == (tmp_path / "rank1.txt").read_text()
    assert "instance/3 for" in (tmp_path / "rank0.txt").read_text()
    assert [(tmp_path / f"told{rank}.txt").read_text() for rank in (0, 1)] == ["143 at 4"] * 2
    assert [path.name for path in (tmp_path / "told/checkpoints").iterdir()] == ["step_000004.ckpt"]
