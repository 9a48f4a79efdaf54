"""comparison.html: several runs side by side, what differs between them and what came of it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dreambooth.metrics.method import ways
from dreambooth.report.charts import WIDE, Chart, Line, chart, smooth, thinned
from dreambooth.report.page import REPORT
from dreambooth.report.pictures import Album, Shot
from dreambooth.report.read import RunData
from dreambooth.report.render import render
from dreambooth.report.scores import Score, known_scores
from dreambooth.report.wording import is_number
from dreambooth.run_folder import MISSING, flatten
from dreambooth.run_id import irrelevant

WALL = 12, 8  # prompts and runs whose pictures stand beside each other
STYLES = 8  # colours of the curves; further ones are dashed
FOLLOWS = ("run_dir", "infer.", "report.", "model.data.cached_")


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
    prompt = next(iter(common_prompts(runs, ("subject",))), None)
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
    wall = [(prompt, _hung(runs, prompt, album)) for prompt in common_prompts(runs)[: WALL[0]]]
    album.develop()
    shown = any(shot for row in rows for shot in row.pictures)
    names = {key: short_name(key, keys) for key in keys}
    return render(
        "comparison.html",
        rows=rows,
        names=names,
        scores=scores,
        plot=plot,
        prompt=prompt,
        pictures_shown=shown,
        wall=wall,
        method=ways([run.summary.get("metrics") or {} for run in runs]),
        hung=rows[: WALL[1]],
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
        if not key.endswith("._partial_")
        and len({repr(tree.get(key, MISSING)) for tree in trees}) > 1
        and not _of_another_card(key, trees)
    ]
    if all(run.changed is not None for run in runs):
        return [key for key in keys if any(_changed(run, key) for run in runs)]
    return [key for key in keys if not irrelevant(f"{key}=")]


def _of_another_card(key: str, trees: Sequence[Mapping[str, Any]]) -> bool:
    """Whether some runs lack a key because their card makes something else, which is said by itself."""
    target = f"{key.rpartition('.')[0]}._target_"
    return any(key not in tree for tree in trees) and len({tree.get(target) for tree in trees}) > 1


def common_prompts(runs: Sequence[RunData], roles: Sequence[str] = ("subject", "class")) -> list[str]:
    """The prompts of these roles that all evaluated runs drew, in the order of the first one."""
    drawn = [[row["prompt"] for row in run.scores if row.get("role") in roles] for run in runs if run.scores]
    return [prompt for prompt in dict.fromkeys(drawn[0]) if all(prompt in each for each in drawn)] if drawn else []


def _hung(runs: Sequence[RunData], prompt: str, album: Album) -> list[Shot | None]:
    """The first picture of a prompt: of the untouched base, and of each run after training."""
    wanted = [("before", runs[0]), *(("after", run) for run in runs[: WALL[1]])]
    return [_picture(run, kind, ("subject", "class"), prompt, album) for kind, run in wanted]


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
    before, after = (_picture(run, kind, ("subject",), prompt, album) for kind in ("before", "after"))
    return before, after


def _picture(run: RunData, kind: str, roles: Sequence[str], prompt: str | None, album: Album) -> Shot | None:
    """The first picture of a set, of one of these roles, that shows a prompt (None: any)."""
    rows = [row for row in run.scores if row["set"] == kind and row.get("role") in roles]
    row = next((row for row in rows if prompt is None or row.get("prompt") == prompt), None)
    alt = f"{run.name}, {kind} training: “{row.get('prompt')}”" if row else ""
    return album.add(run.picture(row), alt, 192) if row else None


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
