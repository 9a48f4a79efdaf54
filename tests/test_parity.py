"""A training step here is one of diffusers' ``train_dreambooth.py``: same pictures and noise, same losses.

``fixtures/diffusers.safetensors`` holds what six steps of that script (diffusers 0.42) read, drew and lost, on the base
that this module writes:

    python -m tests.test_parity BASE
    python -m benchmarks.speed train_dreambooth.py --base BASE --resolution 8 --batches 1 --steps 6 --rounds 1
    cp outputs/benchmark/losses_1/tape.safetensors tests/fixtures/diffusers.safetensors

``fixtures/diffusers_lora.safetensors`` is the same of ``train_dreambooth_lora.py``, with ``--lora 2`` and that script.
That script is right about the loss and wrong about what it leaves: it knows no alpha beside the rank and writes no
settings of the adapters, so that a reader can only assume it; and under transformers 5 it names the text encoder's
weights without ``text_model.``, by which published models and other readers know them. tests/test_tuning.py says what
is written here.
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

LORA = ["model/tuning=lora", "model.tuning.rank=2", "model.tuning.alpha=2"]


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


@pytest.mark.parametrize(("name", "more"), [("diffusers", []), ("diffusers_lora", LORA)])
def test_losses_equal_those_of_diffusers_on_the_same_noise(name, more, tmp_path):
    tape = load_file(Path(__file__).parent / "fixtures" / f"{name}.safetensors")
    overrides = [
        *more,
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
