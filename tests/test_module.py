"""What a step of training computes, and on what."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from dreambooth import weighting
from dreambooth.errors import UserError
from tests.steps import CONSTANT, module_of, run

GOLDEN = [1.86816, 2.21145, 1.90913, 1.86274, 1.9224, 1.71979, 1.17977, 1.36472, 1.48768, 1.20922]
GOLDEN += [1.4391, 1.31329, 1.14692, 1.36461, 1.40196, 1.32253, 0.99798, 1.10843, 1.19677, 0.98783]


def weights(network: nn.Module) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in network.parameters()]


def test_golden_curve(tiny_sd: Path) -> None:
    """The losses of 20 steps. A change that should alter no result leaves them as they are."""
    _, rows = run(module_of(tiny_sd, weighting=partial(weighting.min_snr, gamma=5.0)), 20, gradient_clip_val=1.0)
    assert [row["loss"] for row in rows] == pytest.approx(GOLDEN, rel=1e-3)
    for row in rows:
        assert row["loss"] == pytest.approx(row["instance_loss"] + row["prior_loss"], rel=1e-5)
        assert row["lr"] == pytest.approx(1e-3)


@pytest.mark.parametrize("text", [False, True])
def test_what_learns_and_what_stays(tiny_sd: Path, text: bool) -> None:
    """Every trained parameter gets a float32 update and frees its gradient; the frozen stay the same, bit for bit."""
    module = module_of(tiny_sd, text=text, gradient_checkpointing=text)
    networks = module.family.networks
    before = {name: weights(network) for name, network in networks.items()}
    _, rows = run(module, 2, precision="bf16-mixed")
    assert all(0 < row["grad_norm"] < 100 for row in rows)
    assert {name.split(".")[1] for name, _ in module.named_parameters()} == {"unet", "text_encoder"} - {
        text or "text_encoder"
    }
    for name, network in networks.items():
        learns = name == "unet" or (text and name == "text_encoder")
        assert all(weight.grad is None for weight in network.parameters()), f"{name}: gradients outlive their step"
        changed = [not torch.equal(a, b) for a, b in zip(before[name], weights(network), strict=True)]
        assert all(changed) if learns else not any(changed), name
        assert all(weight.dtype == torch.float32 for weight in network.parameters())


@pytest.mark.slow
def test_overfits_one_picture(tiny_sd: Path) -> None:
    module = module_of(tiny_sd, optim=partial(torch.optim.AdamW, lr=3e-3))
    _, rows = run(module, 150, size=1, prior=False)
    first, last = (sum(row["loss"] for row in part) for part in (rows[:20], rows[-20:]))
    assert last < 0.75 * first
    assert all(row["prior_loss"] == 0 for row in rows)


def test_accumulation_is_a_larger_batch(tiny_sd: Path) -> None:
    """2 x 2 micro-batches of 1 make the steps of one batch of 4, noise and levels included."""
    large, small = module_of(tiny_sd, noise_offset=0.1), module_of(tiny_sd, noise_offset=0.1)
    _, expected = run(large, 3, size=4, gradient_clip_val=1.0)
    _, rows = run(small, 3, size=1, accumulate_grad_batches=4, gradient_clip_val=1.0)
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-4)
    torch.testing.assert_close(weights(small.learned), weights(large.learned), atol=2e-4, rtol=0)


def test_schedule_advances_with_the_steps(tiny_sd: Path) -> None:
    sched = CONSTANT | {"name": "linear", "warmup_steps": 2}
    _, rows = run(module_of(tiny_sd, sched=sched), 6, size=1, accumulate_grad_batches=2)
    assert [row["lr"] for row in rows] == pytest.approx([0, 5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_a_warm_up_may_be_as_long_as_the_run(tiny_sd: Path) -> None:
    """diffusers' polynomial schedule would divide by the steps after it, behind the last one's update."""
    _, rows = run(module_of(tiny_sd, sched=CONSTANT | {"name": "polynomial", "warmup_steps": 3}), 3, size=1)
    assert [row["lr"] for row in rows] == pytest.approx([0, 1e-3 / 3, 2e-3 / 3])


def test_half_precision_masters_are_refused(tiny_sd: Path) -> None:
    with pytest.raises(UserError, match="bf16-mixed"):
        run(module_of(tiny_sd), 1, precision="bf16-true")


@pytest.mark.parametrize("optim", [torch.optim.AdamW, torch.optim.RMSprop])
def test_a_gradient_that_is_not_finite_changes_nothing(tiny_sd: Path, optim: type[torch.optim.Optimizer]) -> None:
    """The update is skipped, on the device where the optimizer can (AdamW), and the next step learns again."""
    module = module_of(tiny_sd, optim=partial(optim, lr=1e-3, weight_decay=0.1))
    run(module, 5, size=5, prior=False, poison="instance/3", gradient_clip_val=1.0)
    assert all(
        torch.equal(a, b) for a, b in zip(weights(module.learned), weights(module_of(tiny_sd).learned), strict=True)
    )
    _, rows = run(module, 5, size=1, prior=False, poison="instance/3", gradient_clip_val=1.0)
    assert sum(row["loss"] != row["loss"] for row in rows) == 1
    assert not torch.equal(weights(module.learned)[0], weights(module_of(tiny_sd).learned)[0])
    assert all(weight.isfinite().all() for weight in weights(module.learned))
