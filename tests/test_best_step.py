"""The weights of the best step put back at the end and exported, by ranks that share them out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dreambooth.callbacks.evaluate import BEST, Evaluate, kept_step
from dreambooth.metrics.suite import Suite
from dreambooth.metrics.tradeoff import Tradeoff
from dreambooth.parallel.tensors import read
from tests.strategies import Job, finish


class Likeness(Suite):
    """What is measured of no picture: the base, then the second step, then something worse."""

    def __init__(self) -> None:
        super().__init__({}, [])
        self.values = [0.1, 0.9, 0.5]

    def summary(self, rows: Any) -> dict[str, float | None]:
        return {"dino": self.values.pop(0)}


class WithoutPictures(Evaluate):
    """Measures, keeps and settles as ever; only nothing is drawn."""

    def __init__(self) -> None:
        self.every, self.tradeoff, self.suite = 2, Tradeoff(1.0), Likeness()
        self.curve, self.asked, self.subjects, self.resolution = {}, [[], []], [], 64
        self.seconds = 0.0

    def _draw_set(self, *_: object) -> None: ...

    def _redraw_base(self, *_: object) -> None: ...

    def _write(self, *_: object) -> None: ...


@pytest.mark.exhaustive
@pytest.mark.parametrize(("strategy", "ema"), [("fsdp", 0.5), ("deepspeed_2", 0.5), ("deepspeed_3", None)])
def test_a_pair_exports_the_step_that_was_the_best(
    tiny_sd: Path, tmp_path: Path, strategy: str, ema: float | None
) -> None:
    finish(Job(tiny_sd, tmp_path, strategy, 2, steps=4, size=1, ema=ema, more=(WithoutPictures(),)))
    assert kept_step(tmp_path / BEST) == 2
    best = load_file(tmp_path / BEST)
    exported = load_file(tmp_path / "pipeline/unet/diffusion_pytorch_model.safetensors")
    assert {f"unet.{name}" for name in exported} == set(best)
    for name, value in exported.items():
        assert torch.equal(value, best[f"unet.{name}"]), name
    kind = "averages/" if ema else "weights/"
    then, last = (read(tmp_path / f"checkpoints/step_{step:06d}.ckpt", kind) for step in (2, 4))
    assert all(torch.equal(then[name], value) for name, value in best.items())
    assert not any(torch.equal(last[name], value) for name, value in best.items() if value.dim() > 1)
