"""Run as a program by test_tuning.py: two ranks of batch 1 with adapters and a text encoder that stops on the way."""

import sys
from functools import partial
from pathlib import Path

import torch

from tests.steps import module_of, run
from tests.test_tuning import LORA

if __name__ == "__main__":
    model, folder = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    module = module_of(model, tuning=partial(LORA, stop_text_encoder_at=2), text=True, teacher=True)
    trainer, rows = run(module, 4, size=1, strategy="ddp", devices=2)
    weights = [weight.detach() for weight in module.learning()]
    torch.save({"losses": [row["loss"] for row in rows], "weights": weights}, folder / f"rank{trainer.global_rank}.pt")
