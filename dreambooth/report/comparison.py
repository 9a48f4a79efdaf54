"""comparison.html: several runs side by side, what differs between them and what came of it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dreambooth.report.charts import WIDE, Chart, Line, chart, smooth, thinned
from dreambooth.report.page import REPORT
from dreambooth.report.pictures import Album, Shot
from dreambooth.report.read import RunData
from dreambooth.report.render import render
from dreambooth.report.scores import Score, known_scores
from dreambooth.report.wording import is_number
from dreambooth.run_folder import MISSING, flatten, irrelevant

STYLES = 8  # colours of the curves; further ones are dashed
FOLLOWS = ("run_dir", "infer.", "report.")


@dataclass(frozen=True)
class Cell:
    """A mean with its interval; ``best`` of its column."""

    value: float | None
    interval: list[float] | None
    best: bool


@dataclass(frozen=True)
class RunRow:
    """A run in the table. ``style`` is the class of its curve, None without one; ``pictures`` are before and after."""

    run: RunData
    href: str
    style: str | None
    settings: list[Any]
    cells: list[Cell]
    pictures: tuple[Shot | None, Shot | None]


def comparison_html(runs: Sequence[RunData], page: Path) -> str:
    """The page at ``page``, whose links to the runs' reports are relative to it."""
    album = Album()
    keys, scores = differing(runs), _scores(runs)
    plot, styles = _plot(runs)
    prompt = common_prompt(runs)
    rows = [
        RunRow(
            run=run,
            href=quote(os.path.relpath(run.folder / REPORT, page.parent)),
            style=styles.get(place),
            settings=[_setting(run, key) for key in keys],
            cells=[_cell(runs, run, score) for score in scores],
            pictures=_pictures(run, prompt, album),
        )
        for place, run in enumerate(runs)
    ]
    album.develop()
    shown = any(shot for row in rows for shot in row.pictures)
    names = {key: short_name(key, keys) for key in keys}
    return render(
        "comparison.html", rows=rows, names=names, scores=scores, plot=plot, prompt=prompt, pictures_shown=shown
    )


def differing(runs: Sequence[RunData]) -> list[str]:
    """The settings that are not the same in all runs.

    Those that somebody changed, where the runs know that; otherwise all that differ and count, though some of them only
    follow others.
    """
    trees = [flatten(run.config) for run in runs]
    keys = [key for key in dict.fromkeys(key for tree in trees for key in tree) if not key.startswith(FOLLOWS)]
    keys = [
        key
        for key in keys
        if not key.endswith("._partial_") and len({repr(tree.get(key, MISSING)) for tree in trees}) > 1
    ]
    if all(run.changed is not None for run in runs):
        return [key for key in keys if any(_changed(run, key) for run in runs)]
    return [key for key in keys if not irrelevant(f"{key}=")]


def common_prompt(runs: Sequence[RunData]) -> str | None:
    """The first prompt of the subject that all evaluated runs drew, None when there is none."""
    drawn = [[row.get("prompt") for row in run.scores if row.get("role") == "subject"] for run in runs if run.scores]
    return next((prompt for prompt in (drawn[0] if drawn else []) if all(prompt in each for each in drawn)), None)


def short_name(key: str, keys: Sequence[str]) -> str:
    """The end of a key that no other one has: ``lr``, or ``optim.lr`` beside ``sched.lr``; a card's group."""
    key, keys = key.removesuffix("._target_"), [other.removesuffix("._target_") for other in keys]
    parts = key.split(".")
    ends = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
    return next((end for end in ends if sum(f".{other}".endswith(f".{end}") for other in keys) == 1), key)


def _setting(run: RunData, key: str) -> Any:
    """The value of a key; of a card that makes something, what it makes."""
    value = flatten(run.config).get(key, MISSING)
    return str(value).rpartition(".")[2] if key.endswith("._target_") else value


def _changed(run: RunData, key: str) -> bool:
    """Whether the key, or the node it is in, is among what the run changed."""
    return any(key == other or key.startswith(f"{other}.") for other in run.changed or {})


def _scores(runs: Sequence[RunData]) -> list[Score]:
    """The scores that any of the runs has after training, in the order of the report."""
    found = {score.key: score for run in runs for score in known_scores(run)}
    return [score for key, score in found.items() if any(is_number(run.means("after").get(key)) for run in runs)]


def _cell(runs: Sequence[RunData], run: RunData, score: Score) -> Cell:
    value = run.means("after").get(score.key)
    others = [other for each in runs if is_number(other := each.means("after").get(score.key))]
    best = {"high": max, "low": min}.get(score.better)
    wins = is_number(value) and len(set(others)) > 1 and best is not None and value == best(others)
    return Cell(value if is_number(value) else None, run.interval("after", score.key), wins)


def _pictures(run: RunData, prompt: str | None, album: Album) -> tuple[Shot | None, Shot | None]:
    """The first picture of the common prompt, else of the run's own first one, before and after."""
    found: list[Shot | None] = []
    for kind in ("before", "after"):
        rows = [row for row in run.scores if (row["set"], row.get("role")) == (kind, "subject")]
        row = next((row for row in rows if prompt is None or row.get("prompt") == prompt), None)
        alt = f"{run.name}, {kind} training: “{row.get('prompt')}”" if row else ""
        found.append(album.add(run.picture(row), alt, 192) if row else None)
    return found[0], found[1]


def _plot(runs: Sequence[RunData]) -> tuple[Chart | None, dict[int, str]]:
    """One curve a run, of its likeness over the steps, or of its loss where nothing was measured on the way."""
    likeness = [(run.name, run.curves.get("step", []), run.curves.get("dino", [])) for run in runs]
    title = "Likeness to the photos (DINO) over the steps"
    if not any(sum(map(is_number, values)) > 1 for _, _, values in likeness):
        likeness = [(run.name, *thinned(run.steps.get("step", []), smooth(run.steps.get("loss", [])))) for run in runs]
        title = "Loss over the steps, smoothed"
    styles = {place: f"c{place % STYLES + 1}" + (" dashed" if place >= STYLES else "") for place in range(len(runs))}
    lines = [Line(name, styles[place], x, y, dots=True) for place, (name, x, y) in enumerate(likeness)]
    plot = chart("overlay", title, lines, size=WIDE)
    drawn = {place for place, (_, _, y) in enumerate(likeness) if sum(map(is_number, y)) > 1}
    return plot, {place: style for place, style in styles.items() if place in drawn}
