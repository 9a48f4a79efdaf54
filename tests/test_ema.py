"""The moving average of what learns."""

from pathlib import Path

import pytorch_lightning as pl
import torch

from dreambooth.callbacks.ema import Ema
from tests.steps import module_of, run


class Trail(pl.Callback):
    """The weights after every optimizer step."""

    def __init__(self) -> None:
        self.weights: dict[int, list[torch.Tensor]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        self.weights[trainer.global_step] = [weight.detach().clone() for weight in pl_module.learning()]


def test_average_and_swap(tiny_sd: Path) -> None:
    """One update a step, whatever the accumulation; inside ``averaged()`` the networks hold it."""
    module, trail, decay = module_of(tiny_sd), Trail(), 0.3
    average = [weight.detach().clone() for weight in module.learning()]
    pipeline = module.family.to_pipeline()
    run(module, 4, size=1, accumulate_grad_batches=2, callbacks=[trail, Ema(decay)])
    for step in range(1, 5):
        d = min(decay, (1 + step) / (10 + step))
        average = [a * d + w * (1 - d) for a, w in zip(average, trail.weights[step], strict=True)]
    with module.averaged():
        torch.testing.assert_close(list(pipeline.unet.parameters()), average)
    assert all(torch.equal(a, b) for a, b in zip(pipeline.unet.parameters(), trail.weights[4], strict=True))
    assert {name.split(".")[0] for name in module.state_dict()} == {"learned", "ema"}


def test_off(tiny_sd: Path) -> None:
    module = module_of(tiny_sd)
    run(module, 1, callbacks=[Ema(None)])
    before = [weight.clone() for weight in module.learning()]
    with module.averaged():
        assert all(torch.equal(a, b) for a, b in zip(module.learning(), before, strict=True))
    assert "ema" not in {name.split(".")[0] for name in module.state_dict()}
