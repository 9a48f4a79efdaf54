"""Likeness against drift: the score that chooses the best step, and when to stop."""

from typing import Any

# In the order of every table; a metrics card may have more.
SCORES = ("dino", "clip_i", "clip_t", "pres", "div", "copy")
LEAST_RISE = 0.01  # of the way from base to photographs: less is noise
LEAST_WAY = 1e-6  # from base to photographs: with less, and with photographs below the base, there are no shares of it
LEAST_HEARD = 0.03  # of clip_t, by which the base follows prompts better than photographs do: less is mostly noise


class Tradeoff:
    """Rows of the curves, the first of them the untouched base.

    fidelity   = (dino - dino_base) / (dino_real - dino_base): the share of the way from the base to real photographs
    drift      = (pres - pres_base) / (dino_real - pres_base): the share of the way from the class to the subject
    forgetting = (clip_t_base - clip_t) / (clip_t_base - clip_t_unheard): the share of the way from prompts followed as
                 the base follows them to photographs of the subject, whatever the prompt
    score      = fidelity - ``drift_weight`` * drift, of drift at least ``least_drift``

    Args:
        dino_real: of the photographs among themselves; None (a single photograph) leaves all but forgetting undefined.
        clip_t_unheard: of the photographs with the prompts, as ``measure.unheard`` has it; None: no forgetting.
        drift_weight: how much drift costs.
        least_drift: what less drift counts as; at 0 a class that has moved away from the subject is no merit.
        patience: stop when fidelity has not risen in that many evaluations (None: never).
        max_drift: stop when drift passes it (None: never).
        max_forgetting: stop when forgetting passes it (None: never).
        target: stop when fidelity passes it (None: never).
    """

    def __init__(
        self,
        dino_real: float | None,
        clip_t_unheard: float | None = None,
        *,
        drift_weight: float = 1.0,
        least_drift: float | None = None,
        patience: int | None = 3,
        max_drift: float | None = 0.5,
        max_forgetting: float | None = 0.5,
        target: float | None = None,
    ) -> None:
        self.real, self.unheard, self.weight = dino_real, clip_t_unheard, drift_weight
        self.least = float("-inf") if least_drift is None else least_drift
        self.patience, self.max_drift, self.max_forgetting, self.target = patience, max_drift, max_forgetting, target
        self.rows: list[dict[str, Any]] = []

    def add(self, step: int, means: dict[str, float | None]) -> dict[str, Any]:
        """Append the row of one evaluation, its score computed, and return it."""
        row: dict[str, Any] = {"step": step, **dict.fromkeys(SCORES), **means}
        self.rows.append(row)
        fidelity, drift = self.fidelity(row), self.drift(row)
        row["score"] = None if fidelity is None else fidelity - self.weight * max(drift or 0.0, self.least)
        return row

    def fidelity(self, row: dict[str, Any]) -> float | None:
        """The share of the way to the photographs, None where undefined."""
        return share(self.rows[0]["dino"], row["dino"], self.real)

    def drift(self, row: dict[str, Any]) -> float | None:
        """The share of the way that the class has gone to the subject, None where undefined."""
        return share(self.rows[0]["pres"], row["pres"], self.real)

    def forgetting(self, row: dict[str, Any]) -> float | None:
        """The share of what the base heard of its prompts that is lost, None where undefined."""
        kept = share(self.unheard, row["clip_t"], self.rows[0]["clip_t"], LEAST_HEARD)
        return None if kept is None else 1 - kept

    def best(self) -> int:
        """The step of the highest score after the base, the later one of equals; the last where no score is defined."""
        scored = [row for row in self.rows[1:] if row["score"] is not None]
        return max(scored, key=lambda row: (row["score"], row["step"]))["step"] if scored else self.rows[-1]["step"]

    def verdict(self) -> str | None:
        """Why to stop now, None while there is no reason."""
        if not self.rows:
            return None
        drift, lost, fidelity = (measure(self.rows[-1]) for measure in (self.drift, self.forgetting, self.fidelity))
        if _above(drift, self.max_drift):
            return (
                f"the class has gone {drift:.0%} of the way to the subject (more than callbacks.evaluate.max_drift="
                f"{self.max_drift:g})"
            )
        if _above(lost, self.max_forgetting):
            return (
                f"the pictures have gone {lost:.0%} of the way from what their prompts say to the photographs, "
                f"whatever the prompt (more than callbacks.evaluate.max_forgetting={self.max_forgetting:g})"
            )
        if _above(fidelity, self.target):
            return (
                f"likeness has gone {fidelity:.0%} of the way to the photographs (callbacks.evaluate.target="
                f"{self.target:g}): more steps would cost the rest of what the model knows"
            )
        return self._stands_still()

    def _stands_still(self) -> str | None:
        shares = [fidelity for row in self.rows if (fidelity := self.fidelity(row)) is not None]
        if not self.patience or len(shares) <= self.patience + 1:
            return None
        before, since = max(shares[: -self.patience]), max(shares[-self.patience :])
        if since >= before + LEAST_RISE:
            return None
        return (
            f"likeness has not risen in {self.patience} evaluations (callbacks.evaluate.patience): "
            f"{before:.0%} of the way to the photographs before, {since:.0%} since"
        )


def share(begin: float | None, value: float | None, end: float | None, least: float = LEAST_WAY) -> float | None:
    """How far ``value`` has gone from ``begin`` (0) up to ``end`` (1), or beyond; None if that is less than ``least``.

    None, too, where ``end`` lies below ``begin``: every gain would count as a loss.
    """
    if value is None or begin is None or end is None or end - begin < least:
        return None
    return (value - begin) / (end - begin)


def _above(value: float | None, limit: float | None) -> bool:
    return value is not None and limit is not None and value > limit
