"""Which pictures the page shows, beside what, with which words."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.report.pictures import Album, Shot
from dreambooth.report.read import Row, RunData
from dreambooth.report.wording import is_number, number

MOST_PROMPTS, MOST_OF_A_PROMPT, MOST_OF_CLASS, MOST_PHOTOS, MOST_NEAREST = 12, 4, 8, 12, 6


@dataclass(frozen=True)
class Pair:
    """Two pictures side by side and what is said below; ``left`` is missing where there is nothing to compare with."""

    left: Shot | None
    right: Shot
    score: str = ""
    note: str = ""


@dataclass(frozen=True)
class PromptRow:
    """The pictures of one prompt; ``more`` are in the run folder only."""

    prompt: str
    pairs: list[Pair]
    more: int


def before_after(run: RunData, album: Album) -> tuple[list[PromptRow], int]:
    """The subject's prompts in their order, each with pictures of the same seeds; and how many prompts are left out."""
    prompts = _by_prompt(run, "subject")
    rows = [_prompt_row(run, album, rows, MOST_OF_A_PROMPT, 400, "dino") for rows in prompts[:MOST_PROMPTS]]
    return [row for row in rows if row.pairs], max(0, len(prompts) - MOST_PROMPTS)


def class_pictures(run: RunData, album: Album) -> list[PromptRow]:
    """The pictures of each class prompt, before and after."""
    prompts = _by_prompt(run, "class")[:MOST_PROMPTS]
    most = MOST_OF_CLASS if len(prompts) == 1 else MOST_OF_A_PROMPT
    rows = [_prompt_row(run, album, rows, most, 260, "pres") for rows in prompts]
    return [row for row in rows if row.pairs]


def typical(run: RunData, album: Album) -> Pair | None:
    """The picture of median likeness, which nobody chose for its looks, and what the untouched model drew instead."""
    rows = [row for row in _of(run, "after", "subject") if run.picture(row).exists()]
    scored = sorted((row for row in rows if is_number(row.get("dino"))), key=lambda row: row["dino"])
    if not rows:
        return None
    row = scored[len(scored) // 2] if scored else rows[0]
    return _pair(run, album, row, 480, "dino")


def photos(run: RunData, album: Album) -> list[Shot]:
    """The subject's photos, the first dozen of them."""
    shown = list(run.photos.items())[:MOST_PHOTOS]
    shots = [album.add(path, f"Photo of the subject, {name}", 420) for name, path in shown]
    return [shot for shot in shots if shot]


def nearest_pairs(run: RunData, album: Album) -> list[Pair]:
    """The pictures most like a single photo, beside that photo, the most alike first."""
    rows = [row for row in _of(run, "after", "subject") if row.get("nearest") in run.judges]
    rows.sort(key=lambda row: -row["copy"] if is_number(row.get("copy")) else 0)
    pairs = []
    for row in rows[:MOST_NEAREST]:
        drawn = album.add(run.picture(row), f"Picture of “{row.get('prompt')}” after training", 300)
        photo = album.add(run.judges[row["nearest"]], f"The photo nearest to it, {row['nearest']}", 300)
        if drawn and photo:
            pairs.append(Pair(drawn, photo, number(row.get("copy")), str(row.get("prompt") or "")))
    return pairs


def sample_grids(run: RunData, album: Album) -> list[tuple[str, Shot]]:
    """The first and the last grid of samples/, where nothing better is there."""
    ends: Sequence[Path] = run.samples[:1] + run.samples[1:][-1:]
    steps = [(int(path.stem.rpartition("_")[2]), path) for path in ends if path.stem[5:].isdigit()]
    shots = [(step, album.add(path, f"Sample pictures at step {step}, a row a prompt", 1500)) for step, path in steps]
    return [(f"Step {step}" if step else "Before training", shot) for step, shot in shots if shot]


def _of(run: RunData, kind: str, role: str) -> list[Row]:
    return [row for row in run.scores if row["set"] == kind and row.get("role") == role]


def _by_prompt(run: RunData, role: str) -> list[list[Row]]:
    """The rows of the pictures after training, a list a prompt."""
    prompts: dict[Any, list[Row]] = {}
    for row in _of(run, "after", role):
        prompts.setdefault(row.get("prompt"), []).append(row)
    return list(prompts.values())


def _prompt_row(run: RunData, album: Album, rows: list[Row], most: int, side: int, score: str) -> PromptRow:
    pairs = [pair for row in rows[:most] if (pair := _pair(run, album, row, side, score))]
    return PromptRow(str(rows[0].get("prompt") or "without a prompt"), pairs, len(rows) - len(pairs))


def _pair(run: RunData, album: Album, row: Row, side: int, score: str) -> Pair | None:
    prompt = row.get("prompt") or ""
    right = album.add(run.picture(row), f"After training: “{prompt}”", side)
    twin = _twin(row, _of(run, "before", str(row.get("role"))))
    left = album.add(run.picture(twin), f"Before training, same seed: “{prompt}”", side) if twin else None
    return Pair(left, right, number(row.get(score)), prompt) if right else None


def _twin(row: Row, others: Iterable[Row]) -> Row | None:
    """The picture of the same prompt and seed."""
    place = ("prompt_index", "picture_index")
    return next((other for other in others if all(other.get(key) == row.get(key) for key in place)), None)
