"""Rectified flow as an objective."""

from typing import Any

import torch
from torch import Tensor

from dreambooth.errors import UserError
from dreambooth.losses import mse
from dreambooth.objective import Loss, Objective


class FlowMatching(Objective):
    """x_t = (1 - s) x0 + s noise at t = s T, s in (0, 1], and the velocity noise - x0 of that straight line.

    Rectified flow (Liu et al. 2022, https://arxiv.org/abs/2209.03003) as Stable Diffusion 3 is trained (Esser et al.
    2024, https://arxiv.org/abs/2403.03206, section 3.1). With snr = ((1 - s) / s)^2 the error of the velocity is
    1 / s^2 = (1 + sqrt(snr))^2 times that of x0.

    Args:
        count: T, the time step of pure noise.
        loss: see losses.py.
        timesteps: ``uniform`` in s, or ``logit_normal``: s = sigmoid(mean + std n), n standard normal (equation 19).
        mean, std: of ``logit_normal``; a mean above 0 favours noise.
        shift: s becomes shift s / (1 + (shift - 1) s), for large pictures (equation 23); 1 changes nothing.
    """

    def __init__(
        self,
        count: int = 1000,
        loss: Loss = mse,
        timesteps: str = "logit_normal",
        mean: float = 0.0,
        std: float = 1.0,
        shift: float = 1.0,
    ):
        self.num_train_timesteps, self.elementwise_loss = count, loss
        self.timesteps, self.mean, self.std, self.shift = timesteps, mean, std, shift

    @classmethod
    def from_scheduler(
        cls, scheduler: Any, loss: Loss = mse, shift: float | None = None, **density: Any
    ) -> "FlowMatching":
        """The flow of a checkpoint's own FlowMatch scheduler, with its ``shift`` unless another is given."""
        kind = type(scheduler).__name__
        if not kind.startswith("FlowMatch"):
            raise UserError(
                f"model/objective=flow_matching: the model's {kind} is none of a flow; "
                "type model/objective=from_checkpoint, or name a model that was trained as a flow"
            )
        if shift is None and scheduler.config.use_dynamic_shifting:
            raise UserError(f"the model's {kind} shifts by the size of a picture: type model.objective.shift=3, say")
        shift = float(scheduler.config.shift) if shift is None else shift
        objective = cls(scheduler.config.num_train_timesteps, loss, shift=shift, **density)
        objective.scheduler = scheduler
        return objective

    def sample_t(self, u: Tensor) -> Tensor:
        """By the density of ``timesteps``, then shifted; float in [1, T]."""
        s = torch.sigmoid(self.mean + self.std * torch.special.ndtri(u)) if self.timesteps == "logit_normal" else u
        s = self.shift * s / (1 + (self.shift - 1) * s)
        steps = self.num_train_timesteps
        return s.clamp(1 / steps, 1) * steps  # without any noise there is nothing to learn

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        s = self._sigma(t).view(-1, *[1] * (x0.dim() - 1))
        return (1 - s) * x0 + s * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """noise - x0, at every t."""
        return noise - x0

    def snr(self, t: Tensor) -> Tensor:
        """((1 - s) / s)^2."""
        s = self._sigma(t)
        return ((1 - s) / s).square()

    def target_to_x0_ratio(self, snr: Tensor) -> Tensor:
        return (1 + snr.sqrt()).square()

    def _sigma(self, t: Tensor) -> Tensor:
        return t.float() / self.num_train_timesteps
