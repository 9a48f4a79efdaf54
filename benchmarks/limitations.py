"""The paper's limitations (section 4.4, figure 9), counted in the pictures of finished benchmarks on the pocket model.

    python -m benchmarks.limitations BENCHMARK_FOLDER [ANOTHER_SEED ...]

A row a place, over all subjects and seeds:

right     share of pictures in the place that their prompt names, by the judge, before and after training
colour    pixels in the subject's own body colour, as a share of those in its photos: below 1 the place or the class has
          taken it (entanglement)
dino      mean cosine to the photos
photos    whether the subject was photographed there

The shipped base has seen every place equally often. Of subjects that were trained on the base of ``benchmarks.rarity``
a second table follows: a row for how often that base saw the subject's class in the place, and the difference from the
often seen places of the same trainings with its 95 % bootstrap interval over trainings.

Written where all the runs lie: limitations.md (both tables), limitations.csv and limitations_rarity.csv (every digit).
"""

import argparse
import csv
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from benchmarks.rarity import RARER, SEEN, UNSEEN
from dreambooth.files import atomic, open_picture
from dreambooth.metrics.intervals import interval, mean
from dreambooth.metrics.measure import read_scores
from dreambooth.pocket import SUBJECTS, encoders, judge, ready
from dreambooth.pocket.backgrounds import CONTEXTS
from dreambooth.pocket.scenes import PLACES, tensor_of, to_float

Row = dict[str, Any]
NEAR = 60  # of 255, Euclidean in RGB: still the same colour under the decoder's blur


def place_of(prompt: str) -> str | None:
    """The place that a prompt names."""
    return next((name for name, words in CONTEXTS.items() if words in prompt), None)


def share_of(colour: tuple[int, int, int], path: Path) -> float:
    """The share of a picture's pixels that are near a colour."""
    pixels = np.asarray(open_picture(path), dtype=np.float64)
    return float((np.linalg.norm(pixels - np.array(colour), axis=-1) < NEAR).mean())


def look(run: Path, referee: torch.nn.Module) -> list[dict[str, Any]]:
    """A record a picture of the subject, before and after, whose prompt names a place."""
    rows = [row for row in read_scores(run / "evaluation" / "scores.jsonl") if row["role"] == "subject"]
    rows = [row for row in rows if place_of(row["prompt"])]
    paths = [run / "evaluation" / row["file"] for row in rows]
    seen = judge.verdicts(referee, to_float(torch.stack([tensor_of(open_picture(path)) for path in paths])))[:, 2]
    body = ready.SUBJECTS[run.name].body
    noun = ready.SUBJECTS[run.name].noun
    photos = mean([share_of(body, path) for path in sorted((SUBJECTS / run.name).glob("*.png"))]) or 1.0
    return [
        {
            "set": row["set"],
            "run": run,
            "noun": noun,
            "place": place_of(row["prompt"]),
            "right": float(PLACES[int(verdict)] == place_of(row["prompt"])),
            "colour": share_of(body, path) / photos,
            "dino": row["dino"],
        }
        for row, path, verdict in zip(rows, paths, seen, strict=True)
    ]


def by_place(records: list[dict[str, Any]]) -> list[Row]:
    """A row a place that pictures were asked for in."""
    rows = []
    for place in CONTEXTS:
        before, after = (
            [record for record in records if (record["place"], record["set"]) == (place, name)]
            for name in ("before", "after")
        )
        if after:
            row = {"place": place, "photos": "yes" if place in ready.PHOTOGRAPHED_IN else "no", "pictures": len(after)}
            row["right_before"] = mean([each["right"] for each in before])
            rows.append(row | {name: mean([each[name] for each in after]) for name in ("right", "colour", "dino")})
    return rows


def table(rows: list[Row]) -> str:
    """The rows of ``by_place`` as a markdown table."""
    lines = ["| place | photos | pictures | right before | right | colour | dino |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row["place"], row["photos"], str(row["pictures"])]
        figures = [row[name] for name in ("right_before", "right", "colour", "dino")]
        cells += ["-" if figure is None else f"{figure:.2f}" for figure in figures]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def base_of(run: Path) -> Path:
    """The folder of the base that a run was trained on, from where its command was typed."""
    return Path(OmegaConf.load(run / "config.yaml").model.from_pretrained)


def level_of(row: dict[str, int], place: str) -> int:
    """Of the rarities that a base was trained for the one of a place, given how often it saw a class in each."""
    return min(RARER, key=lambda level: abs(math.log(level * max(row[place], 1) / max(row.values()))))


def by_rarity(records: list[dict[str, Any]], seen: dict[str, dict[str, int]]) -> list[Row]:
    """A row for how often the base saw the class in the place, by its counts ``seen``; the usual places first."""
    levels: dict[int, list[dict[str, Any]]] = {}
    for each in (record for record in records if record["place"] in UNSEEN):
        levels.setdefault(level_of(seen[each["noun"]], each["place"]), []).append(each)
    rows = []
    for level, own in sorted(levels.items()):
        scenes = [seen[each["noun"]][each["place"]] for each in own]
        before, after = ([each["right"] for each in own if each["set"] == name] for name in ("before", "after"))
        row: Row = {"times_less_seen": level, "scenes_low": min(scenes), "scenes_high": max(scenes)}
        row |= {"pictures": len(after), "right_before": mean(before), "right": mean(after)}
        apart = [right(own, run) - right(levels[RARER[0]], run) for run in sorted({each["run"] for each in own})]
        low, high = interval(apart) or (math.nan, math.nan)
        less = (None, None, None) if level == RARER[0] else (mean(apart), low, high)
        rows.append(row | dict(zip(("less", "less_low", "less_high"), less, strict=True)))
    return rows


def rarity_table(rows: list[Row]) -> str:
    """The rows of ``by_rarity`` as a markdown table."""
    lines = ["| seen | scenes | pictures | right before | right | less often seen |", "|---|---|---|---|---|---|"]
    for level, fewest, most, pictures, before, after, apart, low, high in (row.values() for row in rows):
        often = "1" if level == 1 else f"1/{level}"
        less = "" if apart is None else f"{apart:+.2f} ({low:+.2f} to {high:+.2f})"
        lines.append(f"| {often} | {fewest} to {most} | {pictures} | {before:.2f} | {after:.2f} | {less} |")
    return "\n".join(lines)


def right(records: list[dict[str, Any]], run: Path) -> float:
    """The share of a training's pictures that are in the place that they should be in."""
    return mean([each["right"] for each in records if (each["run"], each["set"]) == (run, "after")]) or 0.0


def write_csv(path: Path, rows: list[Row]) -> None:
    """The rows with every digit."""
    with atomic(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write(folder: Path, records: list[dict[str, Any]], seen: dict[str, dict[str, int]] | None) -> str:
    """The tables of the records in ``folder``, the second where it is known what the base has ``seen``; their text."""
    text = table(places := by_place(records))
    write_csv(folder / "limitations.csv", places)
    if seen is not None and (rows := by_rarity(records, seen)):
        text += f"\n\n{rarity_table(rows)}"
        write_csv(folder / "limitations_rarity.csv", rows)
    runs = dict.fromkeys(os.path.relpath(each["run"], folder) for each in records)
    text += f"\n\nCounted in {', '.join(runs)}."
    with atomic(folder / "limitations.md") as path:
        path.write_text(text + "\n")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="run folders of task=benchmark")
    options = parser.parse_args()
    referee = encoders.load_judge()
    runs = sorted(path.parent for folder in options.folders for path in folder.glob("*/summary.json"))
    if not runs:
        parser.error(f"no finished subject in {', '.join(map(str, options.folders))}")
    records = [record for run in runs for record in look(run, referee)]
    if not records:
        parser.error("no prompt of these runs names a place")
    folder = Path(os.path.commonpath([run.parent.absolute() for run in runs]))
    counts = base_of(runs[0]) / SEEN
    print(write(folder, records, json.loads(counts.read_text()) if counts.exists() else None))
    print(folder / "limitations.md")


if __name__ == "__main__":
    main()
