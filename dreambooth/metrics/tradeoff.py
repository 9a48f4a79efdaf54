"""Likeness against drift: the score that chooses the best step, and when to stop."""

from typing import Any

COLUMNS = ("step", "dino", "clip_i", "clip_t", "pres", "div", "copy", "score")
LEAST_RISE = 0.01  # of the way from base to photographs: less is noise
LEAST_WAY = 1e-6  # from base to photographs: with less, and with photographs below the base, there are no shares of it


class Tradeoff:
    """Rows of the curves, the first of them the untouched base.

    fidelity = (dino - dino_base) / (dino_real - dino_base): the share of the way from the base to real photographs
    drift    = (pres - pres_base) / (dino_real - pres_base): the share of the way from the class to the subject
    score    = fidelity - ``drift_weight`` * max(drift, 0): a class that moved away from the subject is no merit

    Args:
        dino_real: of the photographs among themselves; None (a single photograph) leaves everything undefined.
        drift_weight: how much drift costs.
        patience: stop when fidelity has not risen in that many evaluations (None: never).
        max_drift: stop when drift passes it (None: never).
        target: stop when fidelity reaches it (None: never).
    """

    def __init__(
        self,
        dino_real: float | None,
        drift_weight: float = 1.0,
        patience: int | None = 3,
        max_drift: float | None = 0.5,
        target: float | None = None,
    ) -> None:
        self.real, self.weight, self.patience, self.max_drift = dino_real, drift_weight, patience, max_drift
        self.target = target
        self.rows: list[dict[str, Any]] = []

    def add(self, step: int, means: dict[str, float | None]) -> dict[str, Any]:
        """Append the row of one evaluation, its score computed, and return it."""
        row: dict[str, Any] = {"step": step, **{name: means.get(name) for name in COLUMNS[1:-1]}}
        self.rows.append(row)
        fidelity, drift = self.fidelity(row), self.drift(row)
        row["score"] = None if fidelity is None else fidelity - self.weight * max(drift or 0.0, 0.0)
        return row

    def fidelity(self, row: dict[str, Any]) -> float | None:
        """The share of the way to the photographs, None where undefined."""
        return self._share(row["dino"], self.rows[0]["dino"])

    def drift(self, row: dict[str, Any]) -> float | None:
        """The share of the way that the class has gone to the subject, None where undefined."""
        return self._share(row["pres"], self.rows[0]["pres"])

    def best(self) -> int:
        """The step of the highest score after the base, the later one of equals; the last where no score is defined."""
        scored = [row for row in self.rows[1:] if row["score"] is not None]
        return max(scored, key=lambda row: (row["score"], row["step"]))["step"] if scored else self.rows[-1]["step"]

    def verdict(self) -> str | None:
        """Why to stop now, None while there is no reason."""
        shares = [share for row in self.rows if (share := self.fidelity(row)) is not None]
        drift = self.drift(self.rows[-1]) if self.rows else None
        if self.max_drift is not None and drift is not None and drift > self.max_drift:
            return (
                f"the class has gone {drift:.0%} of the way to the subject (more than callbacks.evaluate.max_drift="
                f"{self.max_drift:g})"
            )
        if self.target is not None and shares and shares[-1] >= self.target:
            return (
                f"likeness has gone {shares[-1]:.0%} of the way to the photographs (callbacks.evaluate.target="
                f"{self.target:g}): more steps would cost the rest of what the model knows"
            )
        if self.patience and len(shares) > self.patience + 1:
            before, since = max(shares[: -self.patience]), max(shares[-self.patience :])
            if since < before + LEAST_RISE:
                return (
                    f"likeness has not risen in {self.patience} evaluations (callbacks.evaluate.patience): "
                    f"{before:.0%} of the way to the photographs before, {since:.0%} since"
                )
        return None

    def _share(self, value: float | None, base: float | None) -> float | None:
        """How far ``value`` has gone from ``base`` to the photographs; None where that is no way.

        Photographs less alike than the base is to them give none: every gain would count as a loss.
        """
        if value is None or base is None or self.real is None or self.real - base < LEAST_WAY:
            return None
        return (value - base) / (self.real - base)
