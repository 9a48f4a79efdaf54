"""The objective as algebra, against diffusers' own schedulers."""

from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler

from dreambooth.errors import UserError
from dreambooth.noise import stratified
from dreambooth.objective import Diffusion
from dreambooth.weighting import blend

TYPES = ("epsilon", "v_prediction", "sample")
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
T = torch.tensor([0, 1, 37, 250, 500, 751, 998, 999])


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(len(T), 4, 5, 3, generator=g), torch.randn(len(T), 4, 5, 3, generator=g)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_agrees_with_ddpm(prediction_type, pair):
    """x_t and the target are DDPMScheduler's, and its own step recovers x0 from every kind of target."""
    x0, noise = pair
    scheduler = DDPMScheduler(**SD, prediction_type=prediction_type, clip_sample=False)
    objective = Diffusion.from_scheduler(scheduler)
    x_t = objective.add_noise(x0, noise, T)
    torch.testing.assert_close(x_t, scheduler.add_noise(x0, noise, T))
    target = objective.target(x0, noise, T)
    wanted = {"epsilon": noise, "v_prediction": scheduler.get_velocity(x0, noise, T), "sample": x0}[prediction_type]
    torch.testing.assert_close(target, wanted)
    for k, t in enumerate(T):
        recovered = scheduler.step(target[k : k + 1], t, x_t[k : k + 1]).pred_original_sample
        torch.testing.assert_close(recovered, x0[k : k + 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_a_weight_means_the_same_for_every_target(prediction_type, pair):
    """For one and the same guess of x0, weight(snr) times its error is the loss, whatever the network predicts."""
    x0, noise = pair
    guess = x0 + 0.1 * noise.flip(0)
    objective = Diffusion.from_scheduler(DDPMScheduler(**SD, prediction_type=prediction_type))
    x_t = objective.add_noise(x0, noise, T)
    a = objective.alphas_cumprod[T].view(-1, 1, 1, 1)
    epsilon = (x_t - a.sqrt() * guess) / (1 - a).sqrt()
    pred = {"epsilon": epsilon, "v_prediction": a.sqrt() * epsilon - (1 - a).sqrt() * guess, "sample": guess}
    loss = objective.loss(pred[prediction_type], x0, noise, T, lambda snr: snr.sqrt())
    error = (guess - x0).square().mean((1, 2, 3))
    torch.testing.assert_close(loss, objective.snr(T).sqrt() * error, rtol=2e-3, atol=1e-6)


def test_a_blend_reaches_from_the_loss_of_the_noise_to_that_of_v(pair):
    x0, noise = pair
    for prediction_type, share in (("epsilon", 0.0), ("v_prediction", 1.0)):
        objective = Diffusion.from_scheduler(DDPMScheduler(**SD, prediction_type=prediction_type))
        plain = objective.loss(0.9 * noise, x0, noise, T, None)
        torch.testing.assert_close(objective.loss(0.9 * noise, x0, noise, T, partial(blend, x0=share)), plain)


def test_loss_without_weight_is_the_mean_squared_error_in_float32(pair):
    x0, noise = pair
    pred = (noise * 0.9).bfloat16()
    loss = Diffusion.from_scheduler(DDPMScheduler(**SD)).loss(pred, x0, noise, T, None)
    assert loss.shape == (len(T),)
    assert loss.dtype == torch.float32
    expected = torch.nn.functional.mse_loss(pred.float(), noise, reduction="none").mean((1, 2, 3))
    torch.testing.assert_close(loss, expected)


def test_zero_terminal_snr_gives_finite_weights(pair):
    x0, noise = pair
    scheduler = DDIMScheduler(**SD, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    objective = Diffusion.from_scheduler(scheduler)
    assert objective.snr(torch.tensor([999])) < 1e-6
    for kind in TYPES:
        loss = Diffusion(objective.alphas_cumprod, kind).loss(x0, x0, noise, T, lambda snr: snr.clamp(max=5))
        assert loss.isfinite().all()


def test_reads_the_checkpoints_own_scheduler():
    pndm = PNDMScheduler(**SD, skip_prk_steps=True, prediction_type="v_prediction")
    objective = Diffusion.from_scheduler(pndm)
    assert objective.prediction_type == "v_prediction"
    torch.testing.assert_close(objective.alphas_cumprod, pndm.alphas_cumprod)
    assert Diffusion.from_scheduler(EulerDiscreteScheduler(**SD)).prediction_type == "epsilon"
    with pytest.raises(UserError, match=r"flow.*epsilon, v_prediction, sample"):
        Diffusion(pndm.alphas_cumprod, "flow")


def test_times_cover_every_level_once():
    objective = Diffusion.from_scheduler(DDPMScheduler(**SD))
    t = objective.sample_t(stratified(1000, seed=0, step=0, purpose="t"))
    assert t.dtype == torch.int64
    assert t.sort().values.tolist() == list(range(1000))
    assert objective.sample_t(torch.tensor([0.0, 1 - 2**-24, 1.0])).tolist() == [0, 999, 999]


def test_losses_by_quarter_of_the_noise_levels():
    objective = Diffusion(torch.linspace(0.99, 0.01, 8), "epsilon")
    sums, counts = objective.by_quarter(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 1, 5, 7]))
    assert sums.tolist() == [3.0, 0.0, 4.0, 8.0]
    assert counts.tolist() == [2.0, 0.0, 1.0, 1.0]
