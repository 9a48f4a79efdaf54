"""Weights against the formulas that papers and diffusers write for each prediction type."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from hydra.utils import instantiate

from dreambooth.objective import Diffusion
from dreambooth.weighting import debiased, min_snr, soft_min_snr, uniform

T = torch.arange(0, 1000, 37)


@pytest.mark.parametrize(
    ("prediction_type", "published"),
    [
        ("epsilon", lambda snr: snr.clamp(max=5.0) / snr),
        ("v_prediction", lambda snr: snr.clamp(max=5.0) / (snr + 1)),
        ("sample", lambda snr: snr.clamp(max=5.0)),
    ],
)
def test_min_snr_is_the_published_weight(prediction_type, published):
    """Hang et al. 2023; the epsilon and v forms are those of diffusers' training scripts."""
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    objective = Diffusion(scheduler.alphas_cumprod, prediction_type)
    torch.testing.assert_close(objective.snr(T), compute_snr(scheduler, T))
    x0, noise = torch.zeros(2, len(T), 1, 2, 2)
    target = objective.target(x0, noise, T)
    torch.testing.assert_close(objective.loss(target + 1, target, T, min_snr), published(objective.snr(T)))


def test_debiased_is_the_published_weight_of_the_noise():
    """Yu et al. 2023: 1 / sqrt(snr) on the loss of the noise."""
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    objective = Diffusion(scheduler.alphas_cumprod, "epsilon")
    noise = torch.zeros(len(T), 1, 2, 2)
    torch.testing.assert_close(objective.loss(noise + 1, noise, T, debiased), compute_snr(scheduler, T).rsqrt())


def test_soft_min_snr_is_the_published_weight_and_below_both_of_its_limits():
    """Crowson et al. 2024: 1 / (sigma^2 + 1 / gamma); it tends to snr and to gamma."""
    snr = torch.tensor([1e-4, 0.1, 5.0, 50.0, 1e5])
    sigma = snr.rsqrt()
    torch.testing.assert_close(soft_min_snr(snr), 1 / (sigma.square() + 1 / 5.0))
    assert (soft_min_snr(snr) < min_snr(snr)).all()
    torch.testing.assert_close(soft_min_snr(snr)[[0, 4]], torch.tensor([1e-4, 5.0]), rtol=1e-4, atol=0)


def test_cards_can_name_every_weighting():
    assert uniform() is None
    weighting = instantiate({"_target_": "dreambooth.weighting.min_snr", "_partial_": True, "gamma": 2.0})
    assert weighting(torch.tensor([1.0, 3.0])).tolist() == [1.0, 2.0]
