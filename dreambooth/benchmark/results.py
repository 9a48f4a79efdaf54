"""Rows of finished subjects, and the macro row beside the paper's Table 1."""

import csv
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dreambooth.errors import UserError
from dreambooth.files import atomic
from dreambooth.metrics.curves import CURVES, read_curves
from dreambooth.metrics.intervals import interval, mean
from dreambooth.metrics.measure import read_scores
from dreambooth.metrics.tradeoff import SCORES

log = logging.getLogger(__name__)
PAPER = {  # Table 1 of arXiv 2208.12242: DINO, CLIP-I, CLIP-T
    "paper: real images": (0.774, 0.885, None),
    "paper: DreamBooth (Imagen)": (0.696, 0.812, 0.306),
    "paper: DreamBooth (Stable Diffusion)": (0.668, 0.803, 0.305),
    "paper: Textual Inversion (Stable Diffusion)": (0.569, 0.780, 0.255),
}


def measured(folder: Path) -> dict[str, Any] | None:
    """The metrics of a finished run folder whose scores are all there and can be read, else None."""
    try:
        rows = Counter(row["set"] for row in read_scores(folder / "evaluation" / "scores.jsonl"))
        metrics = json.loads((folder / "summary.json").read_text())["metrics"]
        return metrics if all(rows[name] == count for name, count in metrics.get("pictures", {}).items()) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
        return None


def table(folders: dict[str, Path]) -> list[dict[str, Any]]:
    """A row a finished subject, then their means (each subject counts once) with 95 % intervals, then the photos'."""
    found = {name: metrics for name, folder in folders.items() if (metrics := measured(folder)) is not None}
    names = names_of([metrics["after"] for metrics in found.values()])
    rows = [{"subject": name, **{key: metrics["after"].get(key) for key in names}} for name, metrics in found.items()]
    for label, part in (("mean", "after"), ("mean of the untouched base", "before"), ("mean of the photos", "real")):
        columns = {name: [metrics[part].get(name) for metrics in found.values()] for name in names}
        spreads = {f"{name}_interval": interval(values) for name, values in columns.items()}
        rows.append({"subject": label, **{name: mean(values) for name, values in columns.items()}, **spreads})
    return rows


def names_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The scores that rows have, the usual ones first; no intervals."""
    every = dict.fromkeys([*SCORES, *(name for row in rows for name in row)])
    return [name for name in every if name != "subject" and not name.endswith("_interval")]


def write(folder: Path, rows: list[dict[str, Any]], method: str = "") -> str:
    """benchmark.csv, benchmark.json and benchmark.md in ``folder``; the last one's text, with the ``method`` below."""
    with atomic(folder / "benchmark.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["subject", *names_of(rows)], lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    with atomic(folder / "benchmark.json") as path:
        path.write_text(json.dumps(rows, indent=2) + "\n")
    text = markdown(rows) + (f"\n\n{method} The paper's rows are by encoders of its own." if method else "")
    with atomic(folder / "benchmark.md") as path:
        path.write_text(text + "\n")
    return text


def curves(folders: dict[str, Path]) -> list[dict[str, Any]]:
    """What was measured on the way: a row a step, means over the subjects that came so far."""
    by_step: dict[int, list[dict[str, Any]]] = {}
    for folder in folders.values():
        for row in read_curves(folder / CURVES):
            by_step.setdefault(row["step"], []).append(row)
    names = list(dict.fromkeys(name for rows in by_step.values() for row in rows for name in row if name != "step"))
    return [
        {"step": step, "subjects": len(rows)} | {name: mean([row.get(name) for row in rows]) for name in names}
        for step, rows in sorted(by_step.items())
    ]


def write_curves(folder: Path, rows: list[dict[str, Any]]) -> str:
    """curves.md and curves.csv in ``folder``, where something was measured between the base and the end."""
    if len(rows) < 3:
        return ""
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    for row in rows:
        step, subjects, *scores = row.values()
        cells = [str(step), str(subjects), *(_cell(value, None) for value in scores)]
        lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    with atomic(folder / "curves.md") as path:
        path.write_text(text)
    with atomic(folder / "curves.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows, and the paper's for comparison, as a markdown table."""
    names = names_of(rows)
    lines = ["| subject | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        cells = [_cell(row[name], row.get(f"{name}_interval")) for name in names]
        lines.append(f"| {row['subject']} | " + " | ".join(cells) + " |")
    for label, values in PAPER.items():
        known = dict(zip(("dino", "clip_i", "clip_t"), values, strict=True))
        cells = [_cell(known.get(name), None) for name in names]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: float | None, spread: list[float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" ({spread[0]:.3f} to {spread[1]:.3f})" if spread else "")
