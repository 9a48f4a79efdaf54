"""From a model to its numbers: the pictures of a protocol, their scores, and the means that summary.json holds."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from PIL import Image

from dreambooth.errors import UserError
from dreambooth.files import atomic, distinct_names, list_pictures, open_picture
from dreambooth.metrics.intervals import mean
from dreambooth.metrics.method import how_measured
from dreambooth.metrics.pictures import Pictures
from dreambooth.metrics.suite import Row, Suite
from dreambooth.picture_files import Settings, describe, numbered_paths
from dreambooth.prompts import phrase, read_prompts, rephrase, without_identifier

SETS = ("before", "after", "real")


class Subject:
    """What pictures are measured against: the photographs, and which words of a prompt are the rare ones.

    ``name`` tells the subjects of one model apart; None where there is one.
    """

    def __init__(
        self, photos: str | None, key: str, instance_prompt: str, class_prompt: str, name: str | None = None
    ) -> None:
        self.paths = list_pictures(Path(photos).expanduser(), key, known=None) if photos else []
        self.photos = Pictures([open_picture(path) for path in self.paths])
        self.instance_prompt, self.class_prompt, self.name = instance_prompt, class_prompt, name

    @classmethod
    def all_of(cls, cfg: DictConfig) -> list["Subject"]:
        """The subjects of a config; photos or pictures that ``evaluate`` names are those of one."""
        data, own = cfg.model.data, cfg.evaluate.photos
        if own is not None or cfg.evaluate.images is not None:
            return [cls(own, "evaluate.photos", data.instance_prompt, data.regularization_prompt)]
        entries = data.get("subjects") or [data]
        names = distinct_names([entry.instance_dir for entry in entries]) if len(entries) > 1 else [None]
        return [
            cls(entry.instance_dir, "model.data.instance_dir", entry.instance_prompt, entry.regularization_prompt, name)
            for entry, name in zip(entries, names, strict=True)
        ]

    def asked(self, prompt: str, first: "Subject") -> str:
        """A prompt of the first subject in the words of this one."""
        return _in_words_of(prompt, first.instance_prompt, self.instance_prompt, "evaluate.prompts")

    def asked_of_class(self, prompt: str, first: "Subject") -> str:
        """A prompt of the first subject's class in the words of this one's."""
        return _in_words_of(prompt, first.class_prompt, self.class_prompt, "evaluate.class_prompts")

    def label(self, path: Path) -> str:
        """What a photograph is called in scores.jsonl."""
        return f"{self.name}/{path.name}" if self.name else path.name

    def text(self, prompt: str, kind: str) -> str:
        """What CLIP-T compares with: the prompt, without its rare words where ``kind`` is "class"."""
        return without_identifier(prompt, self.instance_prompt, self.class_prompt) if kind == "class" else prompt


def _in_words_of(prompt: str, old: str, new: str, key: str) -> str:
    found = prompt if old == new else rephrase(prompt, old, new)
    if found is None:
        raise UserError(
            f"{key}: '{prompt}' lacks '{phrase(old)}', in whose place the words of the other subjects are put; type it "
            "there"
        )
    return found


@dataclass(frozen=True)
class Asked:
    """``count`` pictures of a prompt, which count for a role of a subject: "subject" or "class"."""

    prompt: str
    count: int
    role: str
    subject: Subject


def wanted(how: Mapping[str, Any], subjects: Sequence[Subject]) -> list[Asked]:
    """What an ``evaluate`` node asks for: of each subject its prompts, then the prompts of its class."""
    prompts = read_prompts(how["prompts"], "evaluate.prompts")
    of_class = read_prompts(how["class_prompts"], "evaluate.class_prompts")
    counts, asked = (how["num_images_per_prompt"], how["num_class_images"]), []
    for subject in subjects:
        asked += [Asked(subject.asked(each, subjects[0]), counts[0], "subject", subject) for each in prompts]
        asked += [Asked(subject.asked_of_class(each, subjects[0]), counts[1], "class", subject) for each in of_class]
    return asked


def pictures_of(asked: Sequence[Asked], how: Mapping[str, Any], model: str, weights: str, side: int) -> list[Settings]:
    """The settings of every picture that is asked for, as ``describe`` puts them."""
    return describe([(each.prompt, each.count) for each in asked], how, model, weights, side)


def picture_rows(folder: Path, pictures: Sequence[Settings], asked: Sequence[Asked]) -> list[Row]:
    """Where each picture lies, what it shows and for which role it counts."""
    return [
        {
            "set": folder.name,
            "file": f"{folder.name}/{path.name}",
            "role": asked[settings["prompt_index"]].role,
            "prompt": settings["prompt"],
            "prompt_index": settings["prompt_index"],
            "picture_index": settings["picture_index"],
            **whose(asked[settings["prompt_index"]].subject),
        }
        for path, settings in zip(numbered_paths(folder, pictures), pictures, strict=True)
    ]


def whose(subject: Subject) -> Row:
    """What a row says of its subject, where there are several."""
    return {"subject": subject.name} if subject.name else {}


def score(suite: Suite, rows: Sequence[Row], images: Sequence[Image.Image], subjects: Sequence[Subject]) -> list[Row]:
    """The rows with their scores, each against its subject; ``nearest`` is the name of the photograph."""
    scored = list(rows)
    for subject, role in product(subjects, ("subject", "class")):
        places = [n for n, row in enumerate(rows) if row["role"] == role and row.get("subject") == subject.name]
        prompts = [str(rows[place]["prompt"]) for place in places]
        texts = [subject.text(prompt, suite.text) for prompt in prompts]
        values = suite.rows(role, Pictures([images[place] for place in places], prompts, texts), subject.photos)
        for place, value in zip(places, values, strict=True):
            nearest = None if value["nearest"] is None else subject.label(subject.paths[value["nearest"]])
            scored[place] = {**rows[place], **value, "nearest": nearest}
    return scored


def score_photos(suite: Suite, subjects: Sequence[Subject]) -> list[Row]:
    """A row a photograph, against the others of its subject."""
    blank = {"set": "real", "role": "photo", "prompt": None, "prompt_index": None, "picture_index": None}
    return [
        {**blank, **whose(subject), "file": subject.label(path), **value}
        for subject in subjects
        for path, value in zip(subject.paths, suite.real_rows(subject.photos), strict=True)
    ]


def unheard(suite: Suite, asked: Sequence[Asked]) -> float | None:
    """The prompt fidelity of a model that shows the photographs whatever the prompt; None where it is not measured."""
    means = []
    for subject in dict.fromkeys(each.subject for each in asked):
        prompts = [each.prompt for each in asked if each.subject is subject and each.role == "subject"]
        means.append(mean(suite.unheard(subject.photos, [subject.text(prompt, suite.text) for prompt in prompts])))
    return mean(means)


def metrics_of(suite: Suite, rows: Sequence[Row]) -> dict[str, Any]:
    """``metrics`` of summary.json: means by set, their intervals, and the choices that they depend on.

    Of several subjects the means are over the pictures, or prompts, of all; ``subjects`` has those of each.
    """
    sets = {name: [row for row in rows if row["set"] == name] for name in SETS}
    names = list(dict.fromkeys(row["subject"] for row in rows if "subject" in row))
    each = {
        name: {kind: suite.summary([row for row in part if row["subject"] == name]) for kind, part in sets.items()}
        for name in names
    }
    return {
        **{name: suite.summary(part) for name, part in sets.items()},
        **({"subjects": each} if names else {}),
        "intervals": {name: suite.intervals(part) for name, part in sets.items()},
        "pictures": {name: len(part) for name, part in sets.items()},
        "encoders": {name: encoder.name for name, encoder in suite.encoders.items()},
        "text": suite.text,
        "average": suite.average,
    }


def write_scores(path: Path, rows: Sequence[Row]) -> None:
    """One JSON object a line, all or nothing."""
    with atomic(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_scores(path: Path) -> list[Row]:
    """The rows of a scores.jsonl; UserError for a broken one."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        whole = rows and all(isinstance(row, dict) and {"set", "file"} <= row.keys() for row in rows)
        reason = "" if whole else "it lacks rows with set and file"
    except (OSError, ValueError) as error:
        reason = str(error)
    if reason:
        raise UserError(f"{path} cannot be read ({reason}); remove it and run task=evaluate again")
    return rows


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
    for subject, means in metrics.get("subjects", {}).items():
        lines.append(subject)
        for name in means["before"]:
            cells = [_cell(means[kind][name]) for kind in SETS]
            lines.append(f"  {name:6}{cells[0]:>9}{cells[1]:>9}{'':19}{cells[2]:>9}")
    return "\n".join([*lines, *_footnotes(metrics)])


def _footnotes(metrics: Mapping[str, Any]) -> list[str]:
    """By what was measured, which the numbers depend on, and why diversity is missing."""
    notes = [said] if (said := how_measured(metrics)) else []
    if "lpips" in metrics["encoders"] and metrics["after"].get("div", 0) is None:
        notes.append("div is undefined: there is no second picture of any prompt")
    return notes


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
