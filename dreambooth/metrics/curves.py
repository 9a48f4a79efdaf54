"""curves.csv: what was measured on the way, a row an evaluation."""

import csv
import math
from pathlib import Path
from typing import Any

from dreambooth.errors import UserError
from dreambooth.files import atomic
from dreambooth.metrics.tradeoff import SCORES

CURVES = "curves.csv"
COLUMNS = ("step", *SCORES, "score")  # those that it always has


def read_curves(path: Path, last_step: float = math.inf) -> list[dict[str, Any]]:
    """The rows of the steps up to ``last_step``; those after it belong to a killed run and are measured again.

    None for an empty cell, no rows without a file; UserError for a damaged one.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or ()
            if lacking := [name for name in COLUMNS if name not in names]:
                raise ValueError(f"it lacks {', '.join(lacking)}")
            rows = [{name: float(row[name]) if row[name] else None for name in names} for row in reader]
        return [
            {**row, "step": int(row["step"])} for row in rows if row["step"] is not None and row["step"] <= last_step
        ]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}): repair it, or type resume=false to begin afresh") from None


def write_curves(path: Path, rows: list[dict[str, Any]]) -> None:
    """All rows, under a temporary name first."""
    with atomic(path) as temporary, temporary.open("w", newline="") as file:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: "" if v is None else (v if k == "step" else repr(v)) for k, v in row.items()} for row in rows
        )
