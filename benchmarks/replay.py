"""Our module on the pictures and the noise that diffusers' script was recorded with (``stopwatch.py record``)."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dreambooth.config import build, compose
from dreambooth.module import LOSSES
from dreambooth.tasks import make_module, make_trainer, quieten


class Losses(pl.Callback):
    """The losses of every step, by their names."""

    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: object) -> None:
        self.values.append({name: pl_module.step_metrics[name].item() for name in LOSSES})


def replay(tape: dict[str, Tensor], overrides: list[str], folder: Path) -> list[dict[str, float]]:
    """Train on a tape, (steps, B, ...) of pixels, posterior, noise and timesteps; the losses of each step.

    With the prior, the first half of the B pictures is the instance's, the second half its class's. Pictures and
    prompts are encoded in every step, as diffusers' script does; everything else is the task ``train``. Adapters begin
    as the script's did.
    """
    quieten()
    cfg = compose(overrides)
    family = build(cfg.model.family)
    module = make_module(cfg, build(cfg.model.tuning)(family))
    for name, weight in module.tuning.weights().items():
        if name in tape:
            weight.data.copy_(tape[name][0])
    losses = Losses()
    steps, size = tape["timesteps"].shape
    trainer = make_trainer(cfg, folder, [losses], max_steps=steps)
    family.move(trainer.strategy.root_device)
    levels = (tape["timesteps"] + 0.5) / len(module.objective.alphas_cumprod)
    # in the place of noise.py
    module.draw = lambda batch, purpose, shape: module.send(tape[purpose][batch["step"]])  # type: ignore[method-assign]
    module.draw_levels = lambda batch: module.send(levels[batch["step"]])  # type: ignore[method-assign]
    named = ("instance", "regularization") if cfg.model.with_prior_preservation else ("instance",)
    roles = [role for role in named for _ in range(size // len(named))]
    batches = [
        {
            "step": step,
            "index": list(range(size)),
            "pixels": pixels,
            "prompts": [cfg.model.data[f"{role}_prompt"] for role in roles],
            "is_prior": torch.tensor([role == "regularization" for role in roles]),
        }
        for step, pixels in enumerate(tape["pixels"])
    ]
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return losses.values
