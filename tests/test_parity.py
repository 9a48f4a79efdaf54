"""A training step here is one of diffusers' ``train_dreambooth.py``: same pictures and noise, same losses.

``fixtures/diffusers.safetensors`` holds what six steps of that script (diffusers 0.42) read, drew and lost, on the base
that this module writes:

    python -m tests.test_parity BASE
    python -m benchmarks.speed train_dreambooth.py --base BASE --resolution 8 --batches 1 --steps 10
    cp outputs/benchmark/losses_1/tape.safetensors tests/fixtures/diffusers.safetensors
"""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.replay import replay
from benchmarks.speed import CLASS_PROMPT, LR, PROMPT
from dreambooth.noise import generator
from tests.tiny import build_tiny_sd


def write_base(folder: Path) -> Path:
    """A tiny Stable Diffusion whose weights do not depend on how a library's version initializes them."""
    for path in build_tiny_sd(folder).glob("*/*.safetensors"):
        weights = load_file(path)
        for name, value in weights.items():
            if value.is_floating_point() and value.dim() > 1:
                draw = torch.randn(value.shape, generator=generator(name))
                weights[name] = draw / value[0].numel() ** 0.5
        save_file(weights, path, {"format": "pt"})
    return folder


def test_losses_equal_those_of_diffusers_on_the_same_noise(tmp_path):
    tape = load_file(Path(__file__).parent / "fixtures" / "diffusers.safetensors")
    overrides = [
        "model=pocket",
        "model/weighting=uniform",
        "logger=none",
        f"model.from_pretrained={write_base(tmp_path / 'base')}",
        f"model.optim.lr={LR}",
        f"model.data.instance_prompt={PROMPT}",
        f"model.data.regularization_prompt={CLASS_PROMPT}",
        "trainer.accelerator=cpu",
    ]
    losses = replay(tape, overrides, tmp_path)
    assert losses == pytest.approx(tape["loss"].tolist(), rel=1e-5)  # other betas alone would show: 3e-5


if __name__ == "__main__":
    write_base(Path(sys.argv[1]))
