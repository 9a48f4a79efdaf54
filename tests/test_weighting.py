"""Weights against the formulas that papers and diffusers write for each prediction type."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from hydra.utils import instantiate

from dreambooth.objective import Diffusion
from dreambooth.weighting import min_snr, uniform

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
    pred = objective.target(x0, noise, T) + 1
    torch.testing.assert_close(objective.loss(pred, x0, noise, T, min_snr), published(objective.snr(T)))


def test_cards_can_name_every_weighting():
    assert uniform() is None
    weighting = instantiate({"_target_": "dreambooth.weighting.min_snr", "_partial_": True, "gamma": 2.0})
    assert weighting(torch.tensor([1.0, 3.0])).tolist() == [1.0, 2.0]
