"""report.html of one run: every section's data, and the template that shows them."""

import re
import shlex
from pathlib import Path
from typing import Any

from dreambooth.metrics.method import ways
from dreambooth.report import gallery
from dreambooth.report.curves import charts
from dreambooth.report.pictures import Album
from dreambooth.report.read import SETS, RunData, read_run
from dreambooth.report.render import render, write
from dreambooth.report.scores import known_scores, verdicts
from dreambooth.report.wording import is_number

REPORT = "report.html"
PARTS = {  # of summary.json's seconds
    "prepare_regularization": "class pictures",
    "cache_latents": "encoding",
    "train": "training",
    "sample": "samples",
    "evaluate": "evaluation",
}


def write_report(folder: Path, path: Path | None = None) -> Path:
    """Write the page of a run folder to ``path`` (default: report.html in it) and return where it is.

    Raises UserError for a folder that is no run, for a part that cannot be read, and when the page cannot be written.
    """
    return write(path or folder / REPORT, report_html(read_run(folder)))


def report_html(run: RunData) -> str:
    """The page of a run: one file of less than 5 MB that needs no other."""
    album = Album()
    sections = _sections(run, album)
    album.develop()
    return render("report.html", run=run, **sections)


def _sections(run: RunData, album: Album) -> dict[str, Any]:
    """What the template shows, by name; a section without data is None or empty."""
    rows, left_out = gallery.before_after(run, album)
    return {
        "facts": _facts(run),
        "verdicts": verdicts(run),
        "typical": gallery.typical(run, album),
        "prompts": rows,
        "prompts_left_out": left_out,
        "class_rows": gallery.class_pictures(run, album),
        "photos": gallery.photos(run, album),
        "photos_gone": bool(run.scores) and not run.photos,
        "nearest": gallery.nearest_pairs(run, album),
        "grids": [] if rows else gallery.sample_grids(run, album),
        "charts": charts(run),
        "table": _table(run),
        "sets": SETS,
        "method": ways([run.summary.get("metrics", {})]),
        "times": _times(run),
        "counts": _counts(run),
        "versions": run.summary.get("versions") or {},
        "changed": run.changed,
        "draw": _draw(run),
    }


def _facts(run: RunData) -> list[str]:
    """The line below the title."""
    steps, goal = run.last_step, run.setting("trainer.max_steps")
    finished = bool(run.summary)
    done = "no step yet" if steps is None else f"{steps} steps"
    if not finished and steps is not None and is_number(goal) and goal > steps:
        done = f"{steps} of {goal} steps"
    prior = run.setting("model.with_prior_preservation")
    return [
        f"base model {run.setting('model.from_pretrained', 'unknown')}",
        done if finished else f"{done}, not finished",
        *([f"class “{run.setting('model.data.regularization_prompt')}”"] if prior else ["without prior preservation"]),
    ]


def _table(run: RunData) -> list[dict[str, Any]]:
    """A row a score: its mean and interval before, after, and of the photos among themselves."""
    return [
        {"score": score, "cells": [(run.means(kind).get(score.key), run.interval(kind, score.key)) for kind in SETS]}
        for score in known_scores(run)
    ]


def _times(run: RunData) -> list[tuple[str, float, float]]:
    """(what, seconds, share of the longest), the longest first; the rest of the total is loading and saving."""
    seconds = {name: value for name, value in (run.summary.get("seconds") or {}).items() if is_number(value)}
    total = seconds.pop("total", None)
    parts = {PARTS.get(name, name): value for name, value in seconds.items() if value > 0}
    if total is not None and total > sum(parts.values()):
        parts["loading and saving"] = total - sum(parts.values())
    longest = max(parts.values(), default=1.0)
    return [(name, value, value / longest) for name, value in sorted(parts.items(), key=lambda part: -part[1])]


def _counts(run: RunData) -> list[tuple[str, str, Any]]:
    """(what, the filter that writes it, its value) of single figures."""
    summary = run.summary
    figures = [
        ("in total", "duration", (summary.get("seconds") or {}).get("total")),
        ("steps a second", "number", summary.get("steps_per_second")),
        ("most memory", "memory", summary.get("peak_memory_mb")),
        ("photos", "count", summary.get("num_instance")),
        ("class pictures", "count", summary.get("num_regularization")),
        ("of them newly drawn", "count", summary.get("regularization_generated")),
    ]
    return [figure for figure in figures if is_number(figure[2])]


def _draw(run: RunData) -> str | None:
    """The command that draws with what was learned, where that was exported."""
    if not any((run.folder / name).is_dir() for name in ("pipeline", "adapter")):
        return None
    prompt = f"{run.setting('model.data.instance_prompt')} in the rain"
    return shlex.join(
        ["dreambooth", "task=generate", _typed("infer.model", run.folder), _typed("infer.prompts", prompt)]
    )


def _typed(key: str, value: object) -> str:
    """An override as Hydra reads it: quoted when the value has signs that mean something there."""
    text = str(value)
    return f"{key}={text}" if re.fullmatch(r"[\w ./+-]+", text) else key + '="' + text.replace('"', '\\"') + '"'
