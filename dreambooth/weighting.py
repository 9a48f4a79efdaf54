"""How much each noise level counts: functions of the signal-to-noise ratio, written once for the x0 loss.

The objective divides by what its own target needs (``TARGET_TO_X0`` in objective.py), so that a function here means the
same for every prediction type.
"""

from torch import Tensor


def uniform() -> None:
    """No weight: the loss of the checkpoint's own target as it is, for every prediction type."""


def min_snr(snr: Tensor, gamma: float = 5.0) -> Tensor:
    """min(snr, gamma), of Hang et al. 2023 (https://arxiv.org/abs/2303.09556), eq. 10: ``snr`` (B,) to weights (B,)."""
    return snr.clamp(max=gamma)


def soft_min_snr(snr: Tensor, gamma: float = 5.0) -> Tensor:
    """snr gamma / (snr + gamma): ``min_snr`` without its corner, ``snr`` (B,) to weights (B,).

    1 / (sigma^2 + 1 / gamma) of Crowson et al. 2024 (https://arxiv.org/abs/2401.11605), with sigma^2 = 1 / snr.
    """
    return snr * gamma / (snr + gamma)


def debiased(snr: Tensor) -> Tensor:
    """sqrt(snr), which is 1 / sqrt(snr) on the loss of the noise: ``snr`` (B,) to weights (B,).

    Yu et al. 2023 (https://arxiv.org/abs/2310.08442): an error of the noise moves x0 by snr^-1/2 as much.
    """
    return snr.sqrt()


def blend(snr: Tensor, x0: float = 0.3) -> Tensor:
    """snr + x0: the loss of the noise plus ``x0`` times the loss of x0, ``snr`` (B,) to weights (B,).

    0 is what a model that predicts noise counts by, 1 what one that predicts v does, whose loss is the sum of the two
    (Salimans and Ho 2022, https://arxiv.org/abs/2202.00512, section 4). Between them a v model learns less at the
    noisiest levels, where there is more to see of the photos' backgrounds than of the subject.
    """
    return snr + x0
