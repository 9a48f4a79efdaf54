"""Discrete diffusion as algebra: noise, time and network output come in as arguments, per-example values go out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dreambooth.errors import UserError

Weighting = Callable[[Tensor], Tensor]

# What a weight of the x0 loss is divided by for the loss of each target, given the signal-to-noise ratio:
# |eps - eps'|^2 = snr |x0 - x0'|^2 and |v - v'|^2 = (snr + 1) |x0 - x0'|^2 (Salimans and Ho 2022, section 4).
X0_WEIGHTS: dict[str, Weighting] = {
    "epsilon": lambda snr: snr,
    "v_prediction": lambda snr: snr + 1,
    "sample": torch.ones_like,
}


class Diffusion:
    """x_t = sqrt(a) x0 + sqrt(1 - a) noise at T noise levels a = ``alphas_cumprod`` (T,) (Ho et al. 2020, eq. 4)."""

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str):
        if prediction_type not in X0_WEIGHTS:
            raise UserError(
                f"prediction_type '{prediction_type}' in the model's scheduler_config.json is not known: "
                f"one of {', '.join(X0_WEIGHTS)}"
            )
        self.alphas_cumprod = alphas_cumprod.float()
        self.prediction_type = prediction_type

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> "Diffusion":
        """The noise levels and the prediction type of a checkpoint's own diffusers scheduler."""
        return cls(scheduler.alphas_cumprod, scheduler.config.prediction_type)

    def sample_t(self, u: Tensor) -> Tensor:
        """Uniform numbers ``u`` (B,) in [0, 1) as time steps (B,) int64 in [0, T)."""
        count = len(self.alphas_cumprod)
        return (u * count).long().clamp(max=count - 1)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noisy x_t, float32, in the shape of ``x0`` (B, ...)."""
        signal, sigma = self._levels(x0, t)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should return for x_t: the noise, v = sqrt(a) noise - sqrt(1 - a) x0, or x0."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        signal, sigma = self._levels(x0, t)
        return signal * noise - sigma * x0

    def snr(self, t: Tensor) -> Tensor:
        """The signal-to-noise ratio a / (1 - a) at ``t`` (B,)."""
        a = self._alpha(t)
        return a / (1 - a)

    def loss(
        self,
        pred: Tensor,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        weighting: Weighting | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The mean squared error of each example, (B,) float32, times its weight (None: 1).

        ``mask`` (B, 1, h, w) weighs the latent cells; its mean over an example is 1 (``data.masks``).
        """
        error = (pred.float() - self.target(x0, noise, t).float()).square()
        loss = (error if mask is None else error * mask).flatten(1).mean(1)
        if weighting is None:
            return loss
        snr = self.snr(t).clamp(min=2**-24)  # schedules rescaled to zero terminal SNR would give 0 / 0
        return loss * weighting(snr) / X0_WEIGHTS[self.prediction_type](snr)

    def by_quarter(self, per_example: Tensor, t: Tensor) -> Tensor:
        """(2, 4): sum and count of ``per_example`` (B,) in each quarter of the noise levels, least noise first."""
        quarter = t * 4 // len(self.alphas_cumprod)
        found = quarter[:, None] == torch.arange(4, device=t.device)
        return torch.stack([torch.where(found, per_example[:, None], 0.0).sum(0), found.sum(0).to(per_example)])

    def _alpha(self, t: Tensor) -> Tensor:
        self.alphas_cumprod = self.alphas_cumprod.to(
            t.device
        )  # copied once: an accelerator would wait for it each step
        return self.alphas_cumprod[t]

    def _levels(self, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        a = self._alpha(t).view(-1, *[1] * (x0.dim() - 1))
        return a.sqrt(), (1 - a).sqrt()
