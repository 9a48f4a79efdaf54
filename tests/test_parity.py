"""A training step here is one of diffusers' ``train_dreambooth.py``: same pictures and noise, same losses.

``fixtures/diffusers.safetensors`` holds what steps of that script (diffusers 0.42) read, drew and lost, on the base
that this module writes. Made by

    python -m benchmarks.record train_dreambooth.py

``fixtures/diffusers_lora.safetensors`` is the same of ``train_dreambooth_lora.py``, by

    python -c "from pathlib import Path; from tests.test_parity import write_base as w; w(Path('base'))"
    python -m benchmarks.speed train_dreambooth_lora.py --lora 2 --base base --resolution 8 --batches 1 --steps 10
    cp outputs/benchmark/losses_1/tape.safetensors tests/fixtures/diffusers_lora.safetensors

That script is right about the loss and wrong about what it leaves: it knows no alpha beside the rank and writes no
settings of the adapters, so that a reader can only assume it; and under transformers 5 it names the text encoder's
weights without ``text_model.``, by which published models and other readers know them. tests/test_tuning.py says what
is written here.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.replay import replay
from benchmarks.speed import CLASS_PROMPT, LR, PROMPT
from dreambooth.noise import generator
from dreambooth.objective import Diffusion
from tests.tiny import build_tiny_sd

FIXTURE = Path(__file__).parent / "fixtures" / "diffusers.safetensors"
STILL = 1e-30  # a rate at which no float32 weight moves: each step can be compared although the steps differ
LORA = ("model/tuning=lora", "model.tuning.rank=2", "model.tuning.alpha=2")


def write_base(folder: Path, prediction_type: str = "epsilon") -> Path:
    """A tiny Stable Diffusion whose weights do not depend on how a library's version initializes them."""
    for path in build_tiny_sd(folder, prediction_type).glob("*/*.safetensors"):
        weights = load_file(path)
        for name, value in weights.items():
            if value.is_floating_point() and value.dim() > 1:
                draw = torch.randn(value.shape, generator=generator(name))
                weights[name] = draw / value[0].numel() ** 0.5
        save_file(weights, path, {"format": "pt"})
    return folder


def tape_of(setting: str) -> dict[str, Tensor]:
    """What the script was recorded with: pixels, posterior, noise, timesteps and loss of each step."""
    parts = [(*name.split("."), value) for name, value in load_file(FIXTURE).items()]
    return {name: value for of, name, value in parts if of == setting}


def ours(
    tape: dict[str, Tensor],
    folder: Path,
    weighting: str,
    prior: bool,
    kind: str = "epsilon",
    lr: float = LR,
    more: tuple[str, ...] = (),
) -> list[Any]:
    """Our losses on a tape, {loss, instance_loss, prior_loss} a step."""
    overrides = [
        *more,
        "model=pocket",
        f"model/weighting={weighting}",
        f"model.with_prior_preservation={prior}",
        "logger=none",
        f"model.from_pretrained={write_base(folder / 'base', kind)}",
        f"model.optim.lr={lr}",
        f"model.data.instance_prompt={PROMPT}",
        f"model.data.regularization_prompt={CLASS_PROMPT}",
        "trainer.accelerator=cpu",
    ]
    return replay(tape, overrides, folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "how"),
    [
        ("prior", {"weighting": "uniform", "prior": True}),
        ("min_snr", {"weighting": "min_snr", "prior": False}),
        ("min_snr_v", {"weighting": "min_snr", "prior": False, "kind": "v_prediction"}),
    ],
)
def test_losses_equal_those_of_diffusers_on_the_same_noise(setting: str, how: dict[str, Any], tmp_path: Path) -> None:
    """In float32, over steps that each depend on the updates before them."""
    tape = tape_of(setting)
    losses = [row["loss"] for row in ours(tape, tmp_path, **how)]
    assert losses == pytest.approx(tape["loss"].tolist(), rel=1e-5)  # other betas alone would show: 3e-5


def test_losses_equal_those_of_diffusers_lora_script(tmp_path: Path) -> None:
    tape = load_file(FIXTURE.with_name("diffusers_lora.safetensors"))
    losses = [row["loss"] for row in ours(tape, tmp_path, "uniform", True, more=LORA)]
    assert losses == pytest.approx(tape["loss"].tolist(), rel=1e-5)


@pytest.mark.slow
def test_min_snr_beside_the_prior_is_wrong_there(tmp_path: Path) -> None:
    """The script multiplies the instance's loss by the mean weight of both roles' levels, and the prior's by none.

    Here every example has the weight of its own level. (With two photos a step the script ends in an error instead:
    two losses times four weights.)
    """
    tape = tape_of("min_snr_prior")
    plain, weighted = (ours(tape, tmp_path / name, name, True, lr=STILL) for name in ("uniform", "min_snr"))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square()
    snr = Diffusion((1 - betas).cumprod(0), "epsilon").snr(tape["timesteps"])
    apart = []
    for theirs, (instance, prior), row, here in zip(
        tape["loss"].tolist(), (snr.clamp(max=5) / snr).tolist(), plain, weighted, strict=True
    ):
        assert theirs == pytest.approx(row["instance_loss"] * (instance + prior) / 2 + row["prior_loss"], rel=1e-5)
        assert here["loss"] == pytest.approx(row["instance_loss"] * instance + row["prior_loss"] * prior, rel=1e-5)
        apart.append(abs(theirs / here["loss"] - 1))
    assert max(apart) > 0.1
