"""sweep.md, sweep.csv and comparison.html: the jobs of a sweep, what differs between them and what came of each."""

import csv
import json
import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dreambooth.benchmark import paired
from dreambooth.files import atomic
from dreambooth.report.comparison import comparison_html, short_name
from dreambooth.report.read import read_run
from dreambooth.report.render import write
from dreambooth.report.scores import SCORES
from dreambooth.report.task import COMPARISON
from dreambooth.report.wording import is_number, number
from dreambooth.run_folder import summary_in

log = logging.getLogger(__name__)
FIGURES = ("steps", "best_step", "final_loss", "seconds_train")


@dataclass
class Row:
    """A job of the table. ``scores`` are means, ``intervals`` their 95 % intervals."""

    settings: dict[str, str]
    folder: Path
    error: str | None
    scores: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, list[float]] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)


def finish(folder: Path, records: list[dict[str, Any]]) -> Path:
    """Write the files of a sweep from the records of its jobs (of benchmarks, paired.* too); the path of sweep.md."""
    rows = read_rows(records)
    text = markdown(rows, folder)
    write_csv(folder / "sweep.csv", rows)
    path = write(folder / "sweep.md", text + "\n")
    for older in (*paired.FILES, COMPARISON, "comparison-*.html"):
        for stale in folder.glob(older):
            stale.unlink()  # of the jobs before, which may not be made again from these
    if all(record["task"] == "benchmark" and record["error"] is None for record in records):
        text = paired.write(folder, records)
    compare(folder, rows)
    log.info("%s", text)
    print(path, flush=True)
    return path


def read_rows(records: list[dict[str, Any]]) -> list[Row]:
    """The jobs in their order, each with the settings that are not the same in all."""
    typed = [dict(text.lstrip("+").partition("=")[::2] for text in record["overrides"]) for record in records]
    swept = [
        key for key in dict.fromkeys(key for one in typed for key in one) if len({one.get(key) for one in typed}) > 1
    ]
    return [_row({key: one.get(key, "") for key in swept}, record) for one, record in zip(typed, records, strict=True)]


def _row(settings: dict[str, str], record: dict[str, Any]) -> Row:
    row = Row(settings, Path(record["folder"]), record["error"])
    if record["error"] is None:
        _read_benchmark(row) if record["task"] == "benchmark" else _read_run(row)
    return row


def _read_run(row: Row) -> None:
    """What summary.json says."""
    summary = summary_in(row.folder) or {}  # callbacks.summary=null
    metrics = summary.get("metrics") or {}
    row.scores = _numbers(metrics.get("after") or {})
    spreads = (metrics.get("intervals") or {}).get("after") or {}
    row.intervals = {name: spread for name, spread in spreads.items() if spread and name in row.scores}
    row.figures = {
        "steps": summary.get("steps"),
        "best_step": summary.get("best_step"),
        "final_loss": summary.get("final", {}).get("loss"),
        "seconds_train": summary.get("seconds", {}).get("train"),
    }


def _read_benchmark(row: Row) -> None:
    """The mean over the subjects that benchmark.json has."""
    table = json.loads((row.folder / "benchmark.json").read_text())
    mean = next(line for line in table if line["subject"] == "mean")
    names = [name for name in mean if f"{name}_interval" in mean]
    row.scores = _numbers({name: mean[name] for name in names})
    row.intervals = {name: mean[f"{name}_interval"] for name in row.scores if mean[f"{name}_interval"]}


def _numbers(found: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in found.items() if is_number(value)}


def markdown(rows: list[Row], folder: Path) -> str:
    """The table: settings by their short names, means with intervals (the best of a column bold), folders."""
    better = {score.key: score.better for score in SCORES}
    swept, scores, figures = _columns(rows)
    best = {}
    for name in scores:
        values = [row.scores[name] for row in rows if name in row.scores]
        if len(set(values)) > 1 and name in better:
            best[name] = max(values) if better[name] == "high" else min(values)

    def score(row: Row, name: str) -> str:
        if name not in row.scores:
            return "-"
        value, spread = row.scores[name], row.intervals.get(name)
        text = f"**{value:.3f}**" if value == best.get(name) else f"{value:.3f}"
        return text + (f" ({spread[0]:.3f} to {spread[1]:.3f})" if spread else "")

    def figure(row: Row, name: str) -> str:
        value = row.figures.get(name)
        if isinstance(value, float):
            return number(value, 4 if name == "final_loss" else 0)
        return "-" if value is None else str(value)

    names = [short_name(key.replace("/", "."), [other.replace("/", ".") for other in swept]) for key in swept]
    lines = [[*names, *scores, *(name.replace("_", " ") for name in figures), "run"]]
    for row in rows:
        run = f"failed: {row.error}" if row.error else os.path.relpath(row.folder, folder)
        cells = [
            *row.settings.values(),
            *(score(row, name) for name in scores),
            *(figure(row, name) for name in figures),
        ]
        lines.append([cell.replace("|", "\\|") for cell in (*cells, run)])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_csv(path: Path, rows: list[Row]) -> None:
    """The same with whole keys, every digit, and the ends of the intervals in columns of their own."""

    swept, scores, figures = _columns(rows)
    spread = [name for name in scores if any(name in row.intervals for row in rows)]
    ends = [part for name in scores for part in (name, *([f"{name}_low", f"{name}_high"] if name in spread else []))]
    with atomic(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*swept, *ends, *figures, "run", "error"], lineterminator="\n", restval="")
        writer.writeheader()
        for row in rows:
            low = {f"{name}_low": pair[0] for name, pair in row.intervals.items()}
            high = {f"{name}_high": pair[1] for name, pair in row.intervals.items()}
            own = {name: row.figures.get(name) for name in figures}
            writer.writerow(
                row.settings | row.scores | low | high | own | {"run": str(row.folder), "error": row.error or ""}
            )


def _columns(rows: list[Row]) -> tuple[list[str], list[str], list[str]]:
    """The settings, scores and figures that any row has."""
    scores = list(dict.fromkeys(name for row in rows for name in row.scores))
    figures = [name for name in FIGURES if any(row.figures.get(name) is not None for row in rows)]
    return list(rows[0].settings), scores, figures


def compare(folder: Path, rows: list[Row]) -> None:
    """comparison.html of the runs that ended well; of benchmarks a page a subject, under the first seed only."""
    first = next((row.settings["seed"] for row in rows if "seed" in row.settings), None)
    pages: dict[str, dict[Path, str]] = {}
    for row in rows:
        if (row.folder / "summary.json").exists():
            pages.setdefault(COMPARISON, {})[row.folder] = ""
        elif row.settings.get("seed", first) == first:
            for run in sorted(path.parent for path in row.folder.glob("*/summary.json")):
                pages.setdefault(f"comparison-{run.name}.html", {})[run] = paired.label_of(row.settings) or run.name
    for name, runs in pages.items():
        if len(runs) > 1:
            labelled = [replace(read_run(run), label=label) for run, label in runs.items()]
            write(folder / name, comparison_html(labelled, folder / name))
