"""The time that training takes, without what is drawn and measured beside it."""

import time
from typing import Any


def training_clock(trainer: Any) -> float:
    """Seconds that stand still while callbacks work that count their own ``seconds`` (samples, evaluation)."""
    return time.perf_counter() - sum(getattr(callback, "seconds", 0.0) for callback in trainer.callbacks)
