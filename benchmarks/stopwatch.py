"""Run a training program unchanged, as ``python PROGRAM ...`` would, and note from outside how long each step took.

    python benchmarks/stopwatch.py FOLDER time|bare|record PROGRAM [its arguments]

FOLDER/steps.json then holds the seconds of each optimizer step but the first, by the clock and of the CPU, and the most
memory held until the last one. With STOPWATCH_TURNS="go,done,steps" (two file descriptors and a number) the program
stands still after every so many steps: it writes a byte to ``done`` and reads one from ``go``.
``bare`` answers every repeated ``AutoencoderKL.encode`` with its first answer: what a step costs without encoding.
``record`` also writes FOLDER/tape.safetensors: what each step of diffusers' script read, drew and lost.
"""

import json
import os
import resource
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook


def main(folder: Path, mode: str, program: Path, arguments: list[str]) -> None:
    """Run the program to its end, then write what was noted."""
    folder.mkdir(parents=True, exist_ok=True)
    seconds: list[tuple[float, float]] = []
    peak: list[float] = []
    begun: list[tuple[float, float]] = []
    turns = [int(word) for word in os.environ.get("STOPWATCH_TURNS", "").split(",") if word]
    tape: dict[str, list[Tensor]] = {}

    def note(*_: Any) -> None:
        now = clocks()
        seconds.extend((now[0] - wall, now[1] - cpu) for wall, cpu in begun)
        peak.append(peak_memory_mb())
        if turns and len(peak) % turns[2] == 0:
            os.write(turns[1], b".")
            os.read(turns[0], 1)
        begun[:] = [clocks()]

    register_optimizer_step_post_hook(note)
    if mode == "bare":
        encode_once()
    elif mode == "record":
        tape = record()
    sys.argv, sys.path[0] = [str(program), *arguments], str(program.resolve().parent)
    runpy.run_path(str(program), run_name="__main__")
    (folder / "steps.json").write_text(json.dumps({"seconds": seconds, "peak_memory_mb": peak[-1]}))
    if tape:
        from safetensors.torch import save_file

        save_file(
            {name: torch.stack(values).contiguous() for name, values in tape.items()}, folder / "tape.safetensors"
        )


def clocks() -> tuple[float, float]:
    """Wall clock and CPU seconds of the process."""
    return time.perf_counter(), time.process_time()


def peak_memory_mb() -> float:
    """The most memory so far, in MiB: allocated on a GPU, resident otherwise."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def encode_once() -> None:
    """Keep the first answer of the VAE for each shape of pictures."""
    from diffusers import AutoencoderKL

    encode: Callable[..., Any] = AutoencoderKL.encode
    answers: dict[torch.Size, Any] = {}

    def encode_first(self: Any, pixels: Tensor, *rest: Any) -> Any:
        if pixels.shape not in answers:
            answers[pixels.shape] = encode(self, pixels, *rest)
        return answers[pixels.shape]

    AutoencoderKL.encode = encode_first


def record() -> dict[str, list[Tensor]]:
    """Take down the pictures, the noise of the posterior, the noise, the time steps and the loss of each step.

    And, once, the A of every adapter as it was drawn (B is 0).
    """
    from accelerate import Accelerator
    from diffusers import AutoencoderKL, UNet2DConditionModel

    tape: dict[str, list[Tensor]] = {name: [] for name in ("pixels", "posterior", "noise", "timesteps", "loss")}
    encode: Callable[..., Any] = AutoencoderKL.encode

    def tapped(name: str, draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def drawn(*args: Any, **options: Any) -> Tensor:
            value = draw(*args, **options)
            if len(tape[name]) < len(tape["pixels"]):  # the first draw of each kind after the step's encoding
                tape[name].append(value.detach().cpu().clone())
            return value

        return drawn

    def tapped_encode(self: Any, pixels: Tensor, *rest: Any) -> Any:
        tape["pixels"].append(pixels.cpu().clone())
        return encode(self, pixels, *rest)

    def tapped_log(self: Any, values: dict[str, float], *_: Any, **__: Any) -> None:
        tape["loss"].append(torch.tensor(values["loss"]))

    prepare: Callable[..., Any] = Accelerator.prepare

    def tapped_prepare(self: Any, *parts: Any, **options: Any) -> Any:
        for network in (part for part in parts if isinstance(part, torch.nn.Module)):
            name = "unet" if isinstance(network, UNet2DConditionModel) else "text_encoder"
            weights = {f"{name}.{key}": value for key, value in network.named_parameters() if ".lora_A." in key}
            tape.update({key: [value.detach().clone()] for key, value in weights.items()})
        return prepare(self, *parts, **options)

    AutoencoderKL.encode, Accelerator.log, Accelerator.prepare = tapped_encode, tapped_log, tapped_prepare
    torch.randn, torch.randn_like = tapped("posterior", torch.randn), tapped("noise", torch.randn_like)
    torch.randint = tapped("timesteps", torch.randint)
    return tape


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
