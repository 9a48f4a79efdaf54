"""Losses against their formulas, and inside the objective."""

from functools import partial

import pytest
import torch
from diffusers import DDPMScheduler

from dreambooth.losses import huber, mse, scheduled_huber
from dreambooth.objective import Diffusion
from dreambooth.weighting import min_snr

ANY = torch.ones(())


def published(d: torch.Tensor, c: torch.Tensor | float) -> torch.Tensor:
    """2 c (sqrt(d^2 + c^2) - c), as the paper and diffusers' scripts for it write the pseudo-Huber loss."""
    return 2 * c * ((d.square() + c**2).sqrt() - c)


def test_huber_is_the_published_formula_between_a_square_and_a_line():
    d = torch.tensor([-30.0, -1.0, -0.1, 0.0, 1e-3, 0.2, 7.0], dtype=torch.float64)
    for delta in (0.01, 0.1, 1.0, 10.0):
        torch.testing.assert_close(huber(d, ANY, delta), published(d, delta), rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(huber(d, ANY, 1e6), mse(d, ANY))
    torch.testing.assert_close(huber(d, ANY, 1e-6) / 2e-6, d.abs(), rtol=1e-5, atol=1e-5)
    small = torch.tensor([1e-5])  # float32: sqrt(d^2 + c^2) - c would be 0
    torch.testing.assert_close(huber(small, ANY, 1.0), small.square())


def test_the_scheduled_threshold_is_that_of_the_snr():
    """diffusers, scheduled_huber_loss_training: (1 - c) / (1 + sigma)^2 + c with sigma^2 = (1 - a) / a."""
    a = torch.tensor([0.999, 0.5, 0.01]).view(-1, 1)
    sigma = ((1 - a) / a).sqrt()
    d = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    threshold = (1 - 0.2) / (1 + sigma) ** 2 + 0.2
    torch.testing.assert_close(scheduled_huber(d, a / (1 - a), 0.2), published(d, threshold), rtol=1e-4, atol=1e-6)
    assert scheduled_huber(d, torch.zeros(3, 1), 0.2).isfinite().all()


@pytest.mark.parametrize("loss", [huber, scheduled_huber])
def test_the_objective_takes_the_mean_of_an_example_then_its_weight(loss):
    g = torch.Generator().manual_seed(0)
    x0, noise, pred = torch.randn(3, 6, 4, 5, 3, generator=g)
    t = torch.tensor([3, 900, 40, 999, 500, 0])
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    objective = Diffusion.from_scheduler(scheduler, partial(loss, delta=0.3))
    snr = objective.snr(t)
    each = torch.stack([loss(pred[k] - noise[k], snr[k], 0.3).mean() for k in range(6)])
    target = objective.target(x0, noise, t)
    torch.testing.assert_close(objective.loss(pred, target, t), each)
    torch.testing.assert_close(objective.loss(pred, target, t, min_snr), each * snr.clamp(max=5) / snr)
