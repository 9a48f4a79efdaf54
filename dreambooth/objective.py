"""Noise to target as algebra: noise, time and network output come in as arguments, per-example values go out."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dreambooth.errors import UserError
from dreambooth.losses import mse
from dreambooth.sampling import zero_terminal_snr

Weighting = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]  # see losses.py

# What a weight of the x0 loss is divided by for the loss of each target, given the signal-to-noise ratio:
# |eps - eps'|^2 = snr |x0 - x0'|^2 and |v - v'|^2 = (snr + 1) |x0 - x0'|^2 (Salimans and Ho 2022, section 4).
TARGET_TO_X0: dict[str, Weighting] = {
    "epsilon": lambda snr: snr,
    "v_prediction": lambda snr: snr + 1,
    "sample": torch.ones_like,
}


class Objective(ABC):
    """A noise process: what a network sees of x0 (B, ...) at time steps t (B,), and what it owes.

    t is in [0, ``num_train_timesteps``]. ``scheduler`` of diffusers draws with what was learned; None: nobody draws.
    """

    num_train_timesteps: int
    elementwise_loss: Loss
    scheduler: Any = None

    @abstractmethod
    def sample_t(self, u: Tensor) -> Tensor:
        """Uniform numbers ``u`` (B,) in [0, 1) as time steps (B,), the more noise the higher."""

    @abstractmethod
    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noisy x_t, float32, in the shape of ``x0`` (B, ...)."""

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should return for x_t."""

    @abstractmethod
    def snr(self, t: Tensor) -> Tensor:
        """The signal-to-noise ratio at ``t`` (B,)."""

    @abstractmethod
    def target_to_x0_ratio(self, snr: Tensor) -> Tensor:
        """How many times as large the target's squared error is as that of x0, given the ratio (B,)."""

    def loss(
        self,
        pred: Tensor,
        target: Tensor,
        t: Tensor,
        weighting: Weighting | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The mean loss over each example of ``pred`` against ``target`` (B, ...), (B,) float32, times its weight.

        ``weighting`` None is the weight 1. ``mask`` (B, 1, h, w) weighs the latent cells; its mean over an example is 1
        (``data.masks``).
        """
        difference = pred.float() - target.float()
        snr = self.snr(t).clamp(min=2**-24)  # pure noise would give 0 / 0
        errors = self.elementwise_loss(difference, snr.view(-1, *[1] * (difference.dim() - 1)))
        loss = (errors if mask is None else errors * mask).flatten(1).mean(1)
        return loss if weighting is None else loss * weighting(snr) / self.target_to_x0_ratio(snr)

    def by_quarter(self, per_example: Tensor, t: Tensor) -> Tensor:
        """(2, 4): sum and count of ``per_example`` (B,) in each quarter of the time steps, least noise first."""
        quarter = (t * 4 // self.num_train_timesteps).clamp(max=3)
        found = quarter[:, None] == torch.arange(4, device=t.device)
        return torch.stack([torch.where(found, per_example[:, None], 0.0).sum(0), found.sum(0).to(per_example)])


class Diffusion(Objective):
    """x_t = sqrt(a) x0 + sqrt(1 - a) noise at T noise levels a = ``alphas_cumprod`` (T,) (Ho et al. 2020, eq. 4)."""

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str, loss: Loss = mse):
        if prediction_type not in TARGET_TO_X0:
            raise UserError(
                f"prediction_type '{prediction_type}' in the model's scheduler_config.json is not known: "
                f"one of {', '.join(TARGET_TO_X0)}"
            )
        if prediction_type == "epsilon" and alphas_cumprod[-1] < 1e-6:
            raise UserError(
                "a model that predicts epsilon learns nothing from pure noise, and cannot draw from it: "
                "type model.objective.rescale_zero_terminal_snr=false, or name a model that predicts v"
            )
        self.alphas_cumprod = alphas_cumprod.float()
        self.num_train_timesteps, self.elementwise_loss = len(alphas_cumprod), loss
        self.prediction_type = prediction_type

    @classmethod
    def from_scheduler(cls, scheduler: Any, loss: Loss = mse, rescale_zero_terminal_snr: bool = False) -> "Diffusion":
        """The noise levels and the prediction type of a checkpoint's own diffusers scheduler.

        ``rescale_zero_terminal_snr``: its levels, stretched so that the last is pure noise (Lin et al. 2023).
        """
        if not hasattr(scheduler, "alphas_cumprod"):
            raise UserError(
                f"model/objective=from_checkpoint: the model's {type(scheduler).__name__} has no noise levels of "
                "diffusion; type model/objective=flow_matching"
            )
        scheduler = zero_terminal_snr(scheduler) if rescale_zero_terminal_snr else scheduler
        objective = cls(scheduler.alphas_cumprod, scheduler.config.prediction_type, loss)
        objective.scheduler = scheduler
        return objective

    def sample_t(self, u: Tensor) -> Tensor:
        """Each of the T time steps alike, int64 in [0, T)."""
        return (u * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        signal, sigma = self._levels(x0, t)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noise, v = sqrt(a) noise - sqrt(1 - a) x0, or x0."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        signal, sigma = self._levels(x0, t)
        return signal * noise - sigma * x0

    def snr(self, t: Tensor) -> Tensor:
        """a / (1 - a)."""
        a = self._alpha(t)
        return a / (1 - a)

    def target_to_x0_ratio(self, snr: Tensor) -> Tensor:
        return TARGET_TO_X0[self.prediction_type](snr)

    def _alpha(self, t: Tensor) -> Tensor:
        # Copied once: an accelerator would wait for it each step.
        self.alphas_cumprod = self.alphas_cumprod.to(t.device)
        return self.alphas_cumprod[t]

    def _levels(self, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        a = self._alpha(t).view(-1, *[1] * (x0.dim() - 1))
        return a.sqrt(), (1 - a).sqrt()
