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
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from benchmarks.rarity import RARER, SEEN, UNSEEN
from dreambooth.files import open_picture
from dreambooth.metrics.intervals import interval, mean
from dreambooth.metrics.measure import read_scores
from dreambooth.pocket import SUBJECTS, encoders, judge, ready
from dreambooth.pocket.backgrounds import CONTEXTS
from dreambooth.pocket.scenes import PLACES, tensor_of, to_float

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


def table(records: list[dict[str, Any]]) -> str:
    """The records as a markdown table."""
    lines = ["| place | photos | pictures | right before | right | colour | dino |", "|---|---|---|---|---|---|---|"]
    for place in CONTEXTS:
        after = [record for record in records if (record["place"], record["set"]) == (place, "after")]
        before = [record for record in records if (record["place"], record["set"]) == (place, "before")]
        if not after:
            continue
        cells = [mean([each["right"] for each in before])]
        cells += [mean([each[name] for each in after]) for name in ("right", "colour", "dino")]
        figures = " | ".join("-" if cell is None else f"{cell:.2f}" for cell in cells)
        known = "yes" if place in ready.PHOTOGRAPHED_IN else "no"
        lines.append(f"| {place} | {known} | {len(after)} | {figures} |")
    return "\n".join(lines)


def base_of(run: Path) -> Path:
    """The folder of the base that a run was trained on, from where its command was typed."""
    return Path(OmegaConf.load(run / "config.yaml").model.from_pretrained)


def level_of(row: dict[str, int], place: str) -> int:
    """Of the rarities that a base was trained for the one of a place, given how often it saw a class in each."""
    return min(RARER, key=lambda level: abs(math.log(level * max(row[place], 1) / max(row.values()))))


def rarity_table(records: list[dict[str, Any]], seen: dict[str, dict[str, int]]) -> str:
    """Places right before and after by how often the base saw the class there, as a markdown table."""
    lines = ["| seen | scenes | pictures | right before | right | less often seen |", "|---|---|---|---|---|---|"]
    unseen = [record for record in records if record["place"] in UNSEEN]
    levels: dict[int, list[dict[str, Any]]] = {}
    for each in unseen:
        levels.setdefault(level_of(seen[each["noun"]], each["place"]), []).append(each)
    for level, own in sorted(levels.items()):
        scenes = sorted(seen[each["noun"]][each["place"]] for each in own)
        before, after = ([each for each in own if each["set"] == name] for name in ("before", "after"))
        apart = [right(own, run) - right(levels[RARER[0]], run) for run in sorted({each["run"] for each in own})]
        low, high = interval(apart) or (math.nan, math.nan)
        less = "" if level == RARER[0] else f"{mean(apart):+.2f} ({low:+.2f} to {high:+.2f})"
        figures = " | ".join(f"{mean([each['right'] for each in part]):.2f}" for part in (before, after))
        often = "1" if level == 1 else f"1/{level}"
        lines.append(f"| {often} | {scenes[0]} to {scenes[-1]} | {len(after)} | {figures} | {less} |")
    return "\n".join(lines)


def right(records: list[dict[str, Any]], run: Path) -> float:
    """The share of a training's pictures that are in the place that they should be in."""
    return mean([each["right"] for each in records if (each["run"], each["set"]) == (run, "after")]) or 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="run folders of task=benchmark")
    options = parser.parse_args()
    referee = encoders.load_judge()
    runs = sorted(path.parent for folder in options.folders for path in folder.glob("*/summary.json"))
    if not runs:
        parser.error(f"no finished subject in {', '.join(map(str, options.folders))}")
    records = [record for run in runs for record in look(run, referee)]
    print(table(records))
    if (base_of(runs[0]) / SEEN).exists():
        print(rarity_table(records, json.loads((base_of(runs[0]) / SEEN).read_text())))
    print(json.dumps({"runs": [str(run) for run in runs]}))


if __name__ == "__main__":
    main()
