"""From a model to its numbers: the pictures of a protocol, their scores, and the means that summary.json holds."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from PIL import Image

from dreambooth.errors import UserError
from dreambooth.files import atomic, list_pictures, open_picture
from dreambooth.generation import read_prompts
from dreambooth.metrics.pictures import Pictures
from dreambooth.metrics.suite import Row, Suite, class_text
from dreambooth.picture_files import Settings, numbered_paths

SETS = ("before", "after", "real")


class Subject:
    """What pictures are measured against: the photographs, and which words of a prompt are the rare ones."""

    def __init__(self, photos: str | None, key: str, instance_prompt: str, class_prompt: str) -> None:
        self.paths = list_pictures(Path(photos).expanduser(), key) if photos else []
        self.photos = Pictures([open_picture(path) for path in self.paths])
        self.instance_prompt, self.class_prompt = instance_prompt, class_prompt

    @classmethod
    def of(cls, cfg: DictConfig) -> "Subject":
        """The subject of a config."""
        data, own = cfg.model.data, cfg.evaluate.photos
        if own is not None or cfg.evaluate.images is not None:
            return cls(own, "evaluate.photos", data.instance_prompt, data.regularization_prompt)
        return cls(data.instance_dir, "model.data.instance_dir", data.instance_prompt, data.regularization_prompt)

    def text(self, prompt: str, kind: str) -> str:
        """What CLIP-T compares with: the prompt, without its rare words where ``kind`` is "class"."""
        return class_text(prompt, self.instance_prompt, self.class_prompt) if kind == "class" else prompt


def wanted(how: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(prompt, count) of an ``evaluate`` node: the subject's prompts, and the class prompt last."""
    prompts, count = read_prompts(how["prompts"], "evaluate.prompts"), how["num_images_per_prompt"]
    return [*((prompt, count) for prompt in prompts), (how["class_prompt"], how["num_class_images"])]


def picture_rows(folder: Path, pictures: Sequence[Settings]) -> list[Row]:
    """Where each picture lies, what it shows and for which role it counts: the last prompt is the class's."""
    last = pictures[-1]["prompt_index"]
    return [
        {
            "set": folder.name,
            "file": f"{folder.name}/{path.name}",
            "role": "class" if settings["prompt_index"] == last else "subject",
            "prompt": settings["prompt"],
            "prompt_index": settings["prompt_index"],
            "picture_index": settings["picture_index"],
        }
        for path, settings in zip(numbered_paths(folder, pictures), pictures, strict=True)
    ]


def score(suite: Suite, rows: Sequence[Row], images: Sequence[Image.Image], subject: Subject) -> list[Row]:
    """The rows with their scores; ``nearest`` is the file name of the photograph."""
    scored = list(rows)
    for role in ("subject", "class"):
        places = [place for place, row in enumerate(rows) if row["role"] == role]
        prompts = [str(rows[place]["prompt"]) for place in places]
        texts = [subject.text(prompt, suite.text) for prompt in prompts]
        values = suite.rows(role, Pictures([images[place] for place in places], prompts, texts), subject.photos)
        for place, value in zip(places, values, strict=True):
            nearest = None if value["nearest"] is None else subject.paths[value["nearest"]].name
            scored[place] = {**rows[place], **value, "nearest": nearest}
    return scored


def score_photos(suite: Suite, subject: Subject) -> list[Row]:
    """A row a photograph, against the others."""
    blank = {"set": "real", "role": "photo", "prompt": None, "prompt_index": None, "picture_index": None}
    values = suite.real_rows(subject.photos)
    return [{**blank, "file": path.name, **value} for path, value in zip(subject.paths, values, strict=True)]


def metrics_of(suite: Suite, rows: Sequence[Row]) -> dict[str, Any]:
    """``metrics`` of summary.json: means by set, their intervals, and the choices that they depend on."""
    sets = {name: [row for row in rows if row["set"] == name] for name in SETS}
    return {
        **{name: suite.summary(part) for name, part in sets.items()},
        "intervals": {name: suite.intervals(part) for name, part in sets.items()},
        "pictures": {name: len(part) for name, part in sets.items()},
        "encoders": {name: encoder.name for name, encoder in suite.encoders.items()},
        "text": suite.text,
    }


def write_scores(path: Path, rows: Sequence[Row]) -> None:
    """One JSON object a line, all or nothing."""
    with atomic(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_scores(path: Path) -> list[Row]:
    """The rows of a scores.jsonl; UserError for a broken one."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it and run task=evaluate again") from None


def open_all(folder: Path, rows: Sequence[Row]) -> list[Image.Image]:
    """The pictures of the rows, whose files are named relative to ``folder``."""
    return [open_picture(folder / row["file"]) for row in rows]


def table(metrics: Mapping[str, Any]) -> str:
    """The means as text, a row a score: before, after with its interval, and the photographs among themselves."""
    lines = [f"{'':8}{'before':>9}{'after':>9}{'95 % interval':>19}{'photos':>9}"]
    for name in metrics["before"]:
        cells = [_cell(metrics[kind][name]) for kind in SETS]
        low_high = metrics["intervals"]["after"][name]
        spread = f"{low_high[0]:.3f} to {low_high[1]:.3f}" if low_high else "-"
        lines.append(f"{name:8}{cells[0]:>9}{cells[1]:>9}{spread:>19}{cells[2]:>9}")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
