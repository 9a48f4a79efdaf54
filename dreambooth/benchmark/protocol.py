"""Which subjects a benchmark has, what is asked of each, and in what words."""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.errors import UserError
from dreambooth.files import atomic, list_pictures

LIVE = {"cat", "dog"}  # classes that get the paper's list for live subjects
FILE = "prompts_and_classes.txt"
PHOTOS = "photos-{}"  # in a run folder: those that are learned, by their number, when it is not all
POCKET_PROMPTS = (
    *("a {0} {1} on the beach", "a {0} {1} in the snow", "a {0} {1} at night", "a {0} {1} on the grass"),
    *("a {0} {1} in a room", "a {0} {1} in the city", "a photo of a {0} {1}", "a picture of a {0} {1} on the beach"),
    *("a drawing of a {0} {1} in the snow", "a photo of a {0} {1} at night", "a picture of a {0} {1} in the city"),
    "a drawing of a {0} {1}",
)


@dataclass(frozen=True)
class Task:
    """One subject: name, photos, class noun, and prompts with {0} for the identifier and {1} for the noun."""

    name: str
    photos: Path
    noun: str
    prompts: Sequence[str]

    def settings(self, identifier: str, how: Any, folder: Path) -> dict[str, Any]:
        """What a training of this subject changes in the tree, its run folder being ``folder``.

        ``how.noun`` is learned in the place of the subject's own noun; the class that is measured stays the own one.
        """
        noun = self.noun if how.noun is None else how.noun
        data = {
            "subjects": None,
            "instance_dir": str(self.learned(how.num_photos, folder)),
            "instance_prompt": f"a photo of a {identifier} {noun}".strip(),
            "regularization_prompt": f"a photo of a {noun or self.noun}",
            "cached_instance_dir": str(folder / "latents"),
        }
        measured = {
            "prompts": [" ".join(prompt.format(identifier, noun).split()) for prompt in self.prompts],
            "class_prompts": f"a photo of a {self.noun}",
            "photos": str(self.photos),
            "base_dir": how.base_dir,
            "num_images_per_prompt": how.num_images_per_prompt,
            "num_class_images": how.num_class_images,
        }
        return {"task": "train", "run_dir": str(folder), "model": {"data": data}, "evaluate": measured}

    def are_chosen(self, count: int | None) -> bool:
        """Whether ``count`` is some of the photos, not all (as None is)."""
        return count is not None and count < len(list_pictures(self.photos, "benchmark.folder"))

    def learned(self, count: int | None, folder: Path) -> Path:
        """Where the photos lie that the run in ``folder`` learns."""
        return folder / PHOTOS.format(count) if self.are_chosen(count) else self.photos

    def choose_photos(self, count: int | None, folder: Path) -> None:
        """Copy the first ``count`` photos in the order of their names beside the run; all are read where they are."""
        if not self.are_chosen(count):
            return
        for path in list_pictures(self.photos, "benchmark.folder")[:count]:
            with atomic(self.learned(count, folder) / path.name) as temporary:
                shutil.copyfile(path, temporary)


def tasks_of(how: Any) -> list[Task]:
    """The subjects of a ``benchmark`` node, in the order of their names.

    Raises UserError for a folder without photos or prompts, a subject that it does not have, or has too few photos.
    """
    found = _pocket() if how.folder == "pocket" else _folder(Path(str(how.folder)).expanduser())
    if how.subjects is not None:
        unknown = [name for name in how.subjects if name not in found]
        if unknown:
            raise UserError(f"benchmark.subjects: {', '.join(unknown)} not in {how.folder}; it has {', '.join(found)}")
        found = {name: found[name] for name in sorted(how.subjects)}
    cut = [Task(task.name, task.photos, task.noun, task.prompts[: how.num_prompts]) for task in found.values()]
    if not cut:
        raise UserError(f"benchmark.folder={how.folder}: no subject of {FILE} has a folder of photos there")
    for task in cut:  # all of them before the first is trained
        there = len(list_pictures(task.photos, "benchmark.folder"))
        if how.num_photos is not None and how.num_photos > there:
            raise UserError(
                f"benchmark.num_photos={how.num_photos}, but {task.photos} has {there}; type a smaller number"
            )
    return cut


def _pocket() -> dict[str, Task]:
    from dreambooth.pocket import SUBJECTS
    from dreambooth.pocket.ready import SUBJECTS as FIGURES

    return {name: Task(name, SUBJECTS / name, FIGURES[name].noun, POCKET_PROMPTS) for name in sorted(FIGURES)}


def _folder(folder: Path) -> dict[str, Task]:
    try:
        text = (folder / FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"benchmark.folder: {folder / FILE} cannot be read ({error}); name a folder in google/dreambooth's layout"
        ) from None
    classes, objects, live = parse(text)
    if not classes or not objects or not live:
        raise UserError(f"{folder / FILE} lacks its class table or a list of prompts; take google/dreambooth's file")
    return {
        name: Task(name, folder / name, noun, live if noun in LIVE else objects)
        for name, noun in sorted(classes.items())
        if (folder / name).is_dir()
    }


def parse(text: str) -> tuple[dict[str, str], list[str], list[str]]:
    """The class of each subject, the object prompts and the live prompts of a prompts_and_classes.txt."""
    table, _, rest = text.partition("Object Prompts")
    objects, _, live = rest.partition("Live Subject Prompts")
    rows = (line.split(",") for line in table.splitlines() if line.count(",") == 1)
    classes = {name.strip(): noun.strip() for name, noun in rows if name != "subject_name"}
    return classes, re.findall(r"'(.*)'\.format", objects), re.findall(r"'(.*)'\.format", live)
