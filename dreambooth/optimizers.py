"""What optimizers need beyond torch's contract. Most need nothing: a card in conf/model/optim/ names their class."""

import contextlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dreambooth.errors import UserError
from dreambooth.parallel.parts import whole


def prodigy(**settings: Any) -> "partial[Optimizer]":
    """Prodigy (https://arxiv.org/abs/2306.06101), still to be given what learns, without the line that it prints."""
    from prodigyopt import Prodigy

    def silent(parameters: Any, **settings: Any) -> Optimizer:
        with contextlib.redirect_stdout(io.StringIO()):
            return Prodigy(parameters, **settings)

    return partial(silent, **settings)


def adamw_8bit(**settings: Any) -> "partial[Optimizer]":
    """AdamW with moments of 8 bits (https://arxiv.org/abs/2110.02861), still to be given what learns.

    Raises UserError without a GPU.
    """
    if not torch.cuda.is_available():
        raise UserError(
            "model/optim=adamw_8bit needs a CUDA GPU, and pip install bitsandbytes; "
            "type model/optim=adamw, or model/optim=adafactor for less memory"
        )
    from bitsandbytes.optim import AdamW8bit

    return partial(AdamW8bit, **settings)


@contextmanager
def evaluated(optimizer: Optimizer | None, weights: list[torch.nn.Parameter]) -> Iterator[None]:
    """Within, the weights are those which a Schedule-Free optimizer made: an average of its steps, not the last one.

    (Defazio et al. 2024, https://arxiv.org/abs/2405.15682: gradients are taken at y, x is evaluated.) Afterwards they
    are what they were, bit for bit, which its own way back is not. Other optimizers change nothing.
    """
    if optimizer is None or not (hasattr(optimizer, "eval") and hasattr(optimizer, "train")):
        yield
        return
    kept = [weight.detach().clone() for weight in weights]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        for weight, value in zip(weights, kept, strict=True):
            weight.data.copy_(value)


def clip(optimizer: Optimizer, most: float | None, by_value: bool, scaled: bool) -> Tensor:
    """Clip the gradients to ``most``, and skip the update when one is not finite; their norm before that.

    As GradScaler does, but for every precision: where the loss is ``scaled``, it does the skipping. An optimizer that
    follows torch's protocol for GradScaler (a fused one) does both inside its own pass over the weights, from two
    numbers that stay on the device.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
    if most and by_value:
        torch.nn.utils.clip_grad_value_(parameters, most)
    if getattr(optimizer, "_step_supports_amp_scaling", False) and not scaled:
        found_inf = (~norm.isfinite()).float()
        scale = (norm / most).clamp(min=1) if most and not by_value else None
        optimizer.found_inf, optimizer.grad_scale = found_inf, scale  # type: ignore[attr-defined]
        return norm
    if most and not by_value:
        torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
    if not scaled and not norm.isfinite():
        optimizer.zero_grad(set_to_none=True)  # no gradient, no update
    return norm
