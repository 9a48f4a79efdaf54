"""The objective as algebra, against diffusers' own schedulers."""

import math
from functools import partial

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from dreambooth.errors import UserError
from dreambooth.flow import FlowMatching
from dreambooth.module import prior_loss
from dreambooth.noise import stratified
from dreambooth.objective import Diffusion, Objective
from dreambooth.weighting import blend, debiased, min_snr, soft_min_snr

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


def guessed(objective: Objective, x0: torch.Tensor, guess: torch.Tensor, noise: torch.Tensor, t: torch.Tensor):
    """What a network returns for x_t when it takes ``guess`` for x0: the target that noise and guess would make it."""
    x_t = objective.add_noise(x0, noise, t)
    nothing = torch.zeros_like(x0)
    signal, sigma = objective.add_noise(nothing + 1, nothing, t), objective.add_noise(nothing, nothing + 1, t)
    return objective.target(guess, (x_t - signal * guess) / sigma, t)


def objective_of(kind: str) -> Objective:
    return FlowMatching() if kind == "flow" else Diffusion.from_scheduler(DDPMScheduler(**SD, prediction_type=kind))


@pytest.mark.parametrize("weight", [min_snr, soft_min_snr, debiased, blend, torch.ones_like])
@pytest.mark.parametrize("kind", [*TYPES, "flow"])
def test_a_weight_means_the_same_for_every_target(kind, weight):
    """For one and the same guess of x0, weight(snr) times its error is the loss, whatever the network predicts.

    In a batch whose roles interleave, as well, and the prior's part of the loss is that of its examples alone.
    """
    g = torch.Generator().manual_seed(1)
    x0, noise, error = (torch.randn(64, 4, 3, 3, dtype=torch.float64, generator=g) for _ in range(3))
    objective = objective_of(kind)
    if isinstance(objective, Diffusion):
        objective.alphas_cumprod = objective.alphas_cumprod.double()
    t = objective.sample_t(torch.rand(64, generator=g))
    pred = guessed(objective, x0, x0 + 0.1 * error, noise, t)
    target = objective.target(x0, noise, t)
    loss = objective.loss(pred, target, t, weight)
    expected = weight(objective.snr(t)) * (0.1 * error).square().mean((1, 2, 3))
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-3, atol=1e-6)
    is_prior = torch.rand(64, generator=g) < 0.4
    total, instance, prior = prior_loss(loss, is_prior, 0.7)
    alone = [objective.loss(pred[role], target[role], t[role], weight).mean() for role in (~is_prior, is_prior)]
    torch.testing.assert_close((instance, prior), tuple(alone))
    torch.testing.assert_close(total, alone[0] + 0.7 * alone[1])


def test_a_blend_reaches_from_the_loss_of_the_noise_to_that_of_v(pair):
    x0, noise = pair
    for prediction_type, share in (("epsilon", 0.0), ("v_prediction", 1.0)):
        objective = Diffusion.from_scheduler(DDPMScheduler(**SD, prediction_type=prediction_type))
        target = objective.target(x0, noise, T)
        plain = objective.loss(0.9 * noise, target, T)
        torch.testing.assert_close(objective.loss(0.9 * noise, target, T, partial(blend, x0=share)), plain)


def test_loss_without_weight_is_the_mean_squared_error_in_float32(pair):
    _, noise = pair
    pred = (noise * 0.9).bfloat16()
    loss = Diffusion.from_scheduler(DDPMScheduler(**SD)).loss(pred, noise, T)
    assert loss.shape == (len(T),)
    assert loss.dtype == torch.float32
    expected = torch.nn.functional.mse_loss(pred.float(), noise, reduction="none").mean((1, 2, 3))
    torch.testing.assert_close(loss, expected)


def test_zero_terminal_snr_gives_finite_weights(pair):
    x0, noise = pair
    scheduler = DDIMScheduler(**SD, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    objective = Diffusion.from_scheduler(scheduler)
    assert objective.snr(torch.tensor([999])) < 1e-6
    for kind in ("v_prediction", "sample"):
        other = Diffusion(objective.alphas_cumprod, kind)
        loss = other.loss(x0, other.target(x0, noise, T), T, lambda snr: snr.clamp(max=5))
        assert loss.isfinite().all()


def test_reads_the_checkpoints_own_scheduler():
    pndm = PNDMScheduler(**SD, skip_prk_steps=True, prediction_type="v_prediction")
    objective = Diffusion.from_scheduler(pndm)
    assert objective.prediction_type == "v_prediction"
    torch.testing.assert_close(objective.alphas_cumprod, pndm.alphas_cumprod)
    assert Diffusion.from_scheduler(EulerDiscreteScheduler(**SD)).prediction_type == "epsilon"
    with pytest.raises(UserError, match=r"flow.*epsilon, v_prediction, sample"):
        Diffusion(pndm.alphas_cumprod, "flow")


def test_flow_is_that_of_diffusers(pair):
    """x_t is FlowMatchEuler's, one of its steps along the exact target reaches x0, and shifting is its own."""
    x0, noise = pair
    for shift in (1.0, 3.0):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        objective = FlowMatching.from_scheduler(scheduler, timesteps="uniform")
        t = scheduler.timesteps[[0, 1, 250, 500, 750, 900, 998, 999]]
        x_t = objective.add_noise(x0, noise, t)
        torch.testing.assert_close(x_t, scheduler.scale_noise(x0, t, noise))
        target = objective.target(x0, noise, t)
        for k, level in enumerate(t):
            one = FlowMatchEulerDiscreteScheduler(shift=1.0)
            one.set_timesteps(sigmas=[level.item() / 1000])
            reached = one.step(target[k : k + 1], one.timesteps[0], x_t[k : k + 1]).prev_sample
            torch.testing.assert_close(reached, x0[k : k + 1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(objective.sample_t(torch.arange(1000, 0, -1) / 1000), scheduler.timesteps)
        torch.testing.assert_close(objective.snr(t), ((1 - t / 1000) / (t / 1000)).square())


def test_the_density_of_a_flow_is_logit_normal():
    """The fractions below a level are the density's own, from stratified numbers too; nothing is at 0 or beyond T."""
    u = stratified(4000, seed=0, step=0, purpose="t")
    s = FlowMatching(mean=0.5, std=0.8).sample_t(u) / 1000
    for level in (0.1, 0.5, 0.9):
        z = (math.log(level / (1 - level)) - 0.5) / 0.8
        assert (s < level).float().mean().item() == pytest.approx(0.5 * (1 + math.erf(z / 2**0.5)), abs=2e-3)
    edges = FlowMatching().sample_t(torch.tensor([0.0, 0.5, 1 - 2**-24, 1.0]))
    assert edges[0] == pytest.approx(1)
    assert edges[1] == pytest.approx(500)
    assert (edges <= 1000).all()
    sums, counts = FlowMatching().by_quarter(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 750.0, 1000.0]))
    assert sums.tolist() == [1.0, 0.0, 0.0, 6.0]
    assert counts.tolist() == [1.0, 0.0, 0.0, 2.0]


def test_an_objective_of_another_kind_of_model_is_one_line():
    flow = FlowMatchEulerDiscreteScheduler()
    for wrong, words in [
        (
            lambda: Diffusion.from_scheduler(flow),
            "FlowMatchEulerDiscreteScheduler .*type model/objective=flow_matching",
        ),
        (lambda: FlowMatching.from_scheduler(DDPMScheduler(**SD)), "DDPMScheduler .*model/objective=from_checkpoint"),
        (
            lambda: FlowMatching.from_scheduler(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)),
            r"type model\.objective\.shift=3",
        ),
        (
            lambda: Diffusion.from_scheduler(DDPMScheduler(**SD), rescale_zero_terminal_snr=True),
            r"epsilon .*model\.objective\.rescale_zero_terminal_snr=false",
        ),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            wrong()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler])
def test_zero_terminal_snr_is_that_of_diffusers(kind):
    """The levels are Algorithm 1's, whatever scheduler the checkpoint came with; without the key nothing changes."""
    own = kind(**SD, prediction_type="v_prediction")
    objective = Diffusion.from_scheduler(own, rescale_zero_terminal_snr=True)
    betas = rescale_zero_terminal_snr(own.betas.clone())
    torch.testing.assert_close(objective.alphas_cumprod, (1 - betas).cumprod(0), atol=1e-6, rtol=1e-5)
    config = objective.scheduler.config
    assert (config.rescale_betas_zero_snr, config.timestep_spacing) == (True, "trailing")
    assert config.prediction_type == "v_prediction"
    assert Diffusion.from_scheduler(own).scheduler is own


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
