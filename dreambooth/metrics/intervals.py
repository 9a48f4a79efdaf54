"""Means with bootstrap intervals."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import bootstrap

LEVEL, RESAMPLES = 0.95, 2000


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are defined; None without one."""
    known = defined(values)
    return math.fsum(known) / len(known) if known else None


def interval(values: Sequence[float | None]) -> list[float] | None:
    """95 % bootstrap interval [low, high] of the mean: percentiles of 2,000 resamples. None below two values.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13 (scipy.stats.bootstrap).
    """
    known = defined(values)
    if len(known) < 2:
        return None
    found = bootstrap(
        (np.array(known),),
        np.mean,
        confidence_level=LEVEL,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return [float(found.low), float(found.high)]


def defined(values: Sequence[float | None]) -> list[float]:
    """The values that are numbers."""
    return [value for value in values if value is not None and math.isfinite(value)]
