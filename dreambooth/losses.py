"""What an error costs: functions of the difference between prediction and target, element by element.

``snr`` is the signal-to-noise ratio of each example, in a shape that broadcasts over ``difference`` (B, ...). The
objective takes the mean over an example, then the weighting of its noise level counts.
"""

from torch import Tensor


def mse(difference: Tensor, snr: Tensor) -> Tensor:
    """d^2: the loss of the paper, and what every checkpoint was trained with."""
    return difference.square()


def huber(difference: Tensor, snr: Tensor, delta: float = 0.1) -> Tensor:
    """2 delta (sqrt(d^2 + delta^2) - delta): d^2 below ``delta``, 2 delta |d| above it; the pseudo-Huber loss.

    Source: Khrapov et al. 2024 (https://arxiv.org/abs/2403.16728), in the scale of diffusers' scripts for it.
    """
    square = difference.square()
    return 2 * delta * square / ((square + delta**2).sqrt() + delta)  # the difference above without its cancellation


def scheduled_huber(difference: Tensor, snr: Tensor, delta: float = 0.1) -> Tensor:
    """``huber`` whose threshold falls from 1, where there is no noise, to ``delta`` in pure noise.

    delta + (1 - delta) / (1 + snr^-1/2)^2, the schedule "snr" of the same scripts: details count as they always did,
    and at noisy levels, where the whole of an odd photo is at stake, it decides less.
    """
    threshold = delta + (1 - delta) / (1 + snr.rsqrt()).square()
    square = difference.square()
    return 2 * threshold * square / ((square + threshold.square()).sqrt() + threshold)
