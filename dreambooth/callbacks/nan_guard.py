"""Stop when the loss, or its gradient, stops being a number."""

from collections import deque
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from dreambooth.errors import UserError


class NanGuard(pl.Callback):
    """Ends the run after ``patience`` steps in a row whose loss, or its gradient, is not finite; names their pictures.

    The module skips the update of such a step, so the weights stay finite. Gradients that overflow while fp16's scale
    is above 1 do not count: they are how GradScaler finds it. The count is kept on the device and read
    every ``patience`` steps and at the last: a GPU never waits for it, and the end comes at most as many steps later.
    A run of fewer steps than ``patience`` ends so when none of them was finite.
    """

    def __init__(self, patience: int = 10) -> None:
        self.patience = patience
        self.counts = (0, 0)  # where a resumed run goes on: the row that it was in, and the longest

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.first = self.step = trainer.global_step
        self.row, self.longest = torch.tensor(self.counts, device=pl_module.device)
        # The pictures of twice the patience: a row may have ended just after a reading.
        self.seen: deque[tuple[Tensor, list[str]]] = deque(maxlen=2 * self.patience * trainer.accumulate_grad_batches)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        self.seen.append((outputs["per_example"], batch["paths"]))
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        self.row = (self.row + 1) * _lost(pl_module)
        self.longest = torch.maximum(self.longest, self.row)
        # At the last step before its checkpoint is written: with one there, the same command would be finished.
        if (self.step - self.first) % self.patience == 0 or self.step == trainer.max_steps:
            self.check(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.check(trainer)  # one that was told to stop

    def state_dict(self) -> dict[str, Any]:
        counts = [int(self.row), int(self.longest)]
        return {"counts": counts} if any(counts) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.counts = tuple(state_dict["counts"])

    def check(self, trainer: pl.Trainer) -> None:
        """Raise UserError once ``patience`` steps in a row were not finite. All ranks see the same count."""
        if self.longest.item() < min(self.patience, trainer.max_steps):
            return
        names = [
            path for losses, paths in self.seen for path, loss in zip(paths, losses, strict=True) if not loss.isfinite()
        ]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            everywhere: list[list[str]] = [[]] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everywhere, names)
            names = [path for part in everywhere for path in part]
        what = f"loss was not finite on {', '.join(sorted(set(names)))}" if names else "gradients were not finite"
        look = "look at these pictures, " if names else ""
        raise UserError(
            f"the {what} for {int(self.longest.item())} steps in a row (now at step {self.step}): {look}lower "
            "model.learning_rate, or type trainer.precision=32-true; the weights of the last checkpoint are finite"
        )


def _lost(module: Any) -> Tensor:
    """Whether the step made no update, and not because fp16 is still looking for its scale; on the device."""
    loss, norm = (module.step_metrics[name].to(module.device) for name in ("loss", "grad_norm"))
    scale = module.loss_scale
    searching = torch.tensor(False, device=module.device) if scale is None else scale > 1
    return ~(loss.isfinite() & (norm.isfinite() | searching))
