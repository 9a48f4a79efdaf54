"""How much each noise level counts: functions of the signal-to-noise ratio, written once for the x0 loss.

The objective divides by what its own target needs (``X0_WEIGHTS`` in objective.py), so that a function here means the
same for every prediction type.
"""

from torch import Tensor


def uniform() -> None:
    """No weight: the loss of the checkpoint's own target as it is, for every prediction type."""


def min_snr(snr: Tensor, gamma: float = 5.0) -> Tensor:
    """min(snr, gamma), of Hang et al. 2023 (https://arxiv.org/abs/2303.09556), eq. 10: ``snr`` (B,) to weights (B,)."""
    return snr.clamp(max=gamma)
