"""curves.csv: what was measured on the way, a row an evaluation."""

import csv
import math
from pathlib import Path
from typing import Any

from dreambooth.errors import UserError
from dreambooth.files import atomic
from dreambooth.metrics.tradeoff import COLUMNS

CURVES = "curves.csv"


def read_curves(path: Path, last_step: float = math.inf) -> list[dict[str, Any]]:
    """The rows of the steps up to ``last_step``; those after it belong to a killed run and are measured again.

    None for an empty cell, no rows without a file; UserError for a damaged one.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            rows = [{name: float(row[name]) if row[name] else None for name in COLUMNS} for row in csv.DictReader(file)]
        return [
            {**row, "step": int(row["step"])} for row in rows if row["step"] is not None and row["step"] <= last_step
        ]
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}): repair it, or type resume=false to begin afresh") from None


def write_curves(path: Path, rows: list[dict[str, Any]]) -> None:
    """All rows, under a temporary name first."""
    with atomic(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: "" if v is None else (v if k == "step" else repr(v)) for k, v in row.items()} for row in rows
        )
