"""Benchmarks of several settings side by side: means, and how far each setting is from the first one.

The unit is a training: one subject under one seed. A setting's mean counts each unit once; a difference is taken
picture by picture (same subject, seed, prompt and noise), averaged over a unit, and its interval is over units, so that
pictures of one training do not pass for independent ones.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.benchmark.results import measured, names_of
from dreambooth.files import atomic
from dreambooth.metrics.intervals import interval, mean
from dreambooth.metrics.measure import read_scores
from dreambooth.metrics.method import ways

FILES = ("paired.md", "paired.csv")
Unit = tuple[str, str]  # subject, seed
Scores = dict[tuple[Any, ...], dict[str, float | None]]  # (role, prompt number, picture number) to the scores


@dataclass(frozen=True)
class Outcome:
    """One setting: its units' scores after training, and what a training took."""

    label: str
    units: dict[Unit, Scores]
    seconds: float | None
    megabytes: float | None
    metrics: list[dict[str, Any]]  # of its units' summaries: they say how they were measured


def outcome(label: str, folders: Mapping[str, Path]) -> Outcome:
    """Read a setting's benchmark folders, by seed; a subject that is not finished is left out."""
    found = [
        (run, seed, metrics)
        for seed, folder in folders.items()
        for run in sorted(path for path in folder.iterdir() if path.is_dir())
        if (metrics := measured(run)) is not None
    ]
    units = {(run.name, seed): _scores(run, metrics) for run, seed, metrics in found}
    seconds, sizes = ([read(run) for run, _, _ in found] for read in (_seconds, _size))
    return Outcome(label, units, mean(seconds), mean(sizes), [metrics for _, _, metrics in found])


def label_of(settings: Mapping[str, str]) -> str:
    """What a setting of a sweep is called: by the ends of its keys, whatever the seed."""
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in settings.items() if key != "seed")


def outcomes_of(records: Sequence[Mapping[str, Any]]) -> list[Outcome]:
    """The settings of a sweep over benchmarks, in its order.

    A record has the ``overrides`` of a job and its ``folder``. Jobs that differ in nothing but the seed are one
    setting, which is named by what is not the same in all jobs.
    """
    typed = [dict(text.lstrip("+").partition("=")[::2] for text in record["overrides"]) for record in records]
    swept = [
        key for key in dict.fromkeys(key for one in typed for key in one) if len({one.get(key) for one in typed}) > 1
    ]
    groups: dict[str, dict[str, Path]] = {}
    for one, record in zip(typed, records, strict=True):
        label = label_of({key: one.get(key, "-") for key in swept})
        groups.setdefault(label or "all", {})[one.get("seed", "")] = Path(record["folder"])
    return [outcome(label, folders) for label, folders in groups.items()]


def write(folder: Path, records: Sequence[Mapping[str, Any]]) -> str:
    """Write FILES of a sweep over benchmarks; the text of paired.md."""
    outcomes = outcomes_of(records)
    rows = compare(outcomes)
    # Whatever order of averaging the runs' own tables have: a difference is one of pictures, and so are the means here.
    measured_by = [{**metrics, "average": "pictures"} for each in outcomes for metrics in each.metrics]
    text = markdown(rows, ways(measured_by))
    page, sheet = (folder / name for name in FILES)
    with atomic(page) as path:
        path.write_text(text)
    with atomic(sheet) as path, path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0])
        writer.writerows(
            [json.dumps(cell) if isinstance(cell, list) else cell for cell in row.values()] for row in rows
        )
    return text


def compare(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row a setting: ``label``, ``units``, and of each score its mean, interval, difference and its interval.

    Differences are from the first setting, over the units that both have; None there.
    """
    rows = []
    names = names_of(scores for each in outcomes for unit in each.units.values() for scores in unit.values())
    for each in outcomes:
        row: dict[str, Any] = {"label": each.label, "units": len(each.units)}
        for name in names:
            values = [_mean(each.units[unit], name) for unit in sorted(each.units)]
            row |= {name: mean(values), f"{name}_interval": interval(values)}
            apart = [] if each is outcomes[0] else _differences(outcomes[0], each, name)
            row |= {f"{name}_difference": mean(apart), f"{name}_difference_interval": interval(apart)}
        rows.append({**row, "seconds": each.seconds, "megabytes": each.megabytes})
    return rows


def markdown(rows: Sequence[Mapping[str, Any]], method: str) -> str:
    """Two tables: means with their 95 % intervals, and paired differences from the first row; and the ``method``."""
    names = [name for name in rows[0] if f"{name}_difference" in rows[0]]
    head = "| | " + " | ".join(names) + " |"
    rule = "|---" * (len(names) + 1) + "|"
    means = ["| | " + " | ".join((*names, "seconds", "MB")) + " |", "|---" * (len(names) + 3) + "|"]
    for row in rows:
        cells = [_cell(row[name], row[f"{name}_interval"], "") for name in names]
        took = [_plain(row["seconds"], 0), _plain(row["megabytes"], 1)]
        means.append(f"| {row['label']} | " + " | ".join([*cells, *took]) + " |")
    apart = [head.replace("| |", f"| less {rows[0]['label']} |", 1), rule] if len(rows) > 1 else []
    for row in rows[1:]:
        cells = [_cell(row[f"{name}_difference"], row[f"{name}_difference_interval"], "+") for name in names]
        apart.append(f"| {row['label']} | " + " | ".join(cells) + " |")
    units = f"Means over {', '.join(sorted({str(row['units']) for row in rows}))} trainings (subjects x seeds)."
    return "\n".join([f"{units} {method}".strip(), "", *means, *([""] if apart else []), *apart]) + "\n"


def _scores(run: Path, metrics: Mapping[str, Any]) -> Scores:
    rows = read_scores(run / "evaluation" / "scores.jsonl")
    names = names_of([metrics["after"]])
    return {
        (row["role"], row["prompt_index"], row["picture_index"]): {name: row.get(name) for name in names}
        for row in rows
        if row["set"] == "after"
    }


def _mean(scores: Scores, name: str) -> float | None:
    return mean([row.get(name) for row in scores.values()])


def _differences(first: Outcome, other: Outcome, name: str) -> list[float | None]:
    found = []
    for unit in sorted(first.units.keys() & other.units.keys()):
        a, b = first.units[unit], other.units[unit]
        pairs = [(a[place].get(name), b[place].get(name)) for place in a.keys() & b.keys()]
        found.append(mean([y - x for x, y in pairs if x is not None and y is not None]))
    return found


def _seconds(run: Path) -> float | None:
    return json.loads((run / "summary.json").read_text())["seconds"].get("train")


def _size(run: Path) -> float | None:
    """What was learned, on disk: the adapter where there is one, else the pipeline's networks; MB of 10^6 bytes."""
    folder = next((run / name for name in ("adapter", "pipeline") if (run / name).is_dir()), None)
    return None if folder is None else sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e6


def _cell(value: float | None, spread: list[float] | None, sign: str) -> str:
    if value is None:
        return "-"
    return f"{value:{sign}.3f}" + (f" ({spread[0]:{sign}.3f} to {spread[1]:{sign}.3f})" if spread else "")


def _plain(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
