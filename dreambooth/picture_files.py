"""Numbered pictures on disk, each with the settings that drew it: drawn where missing or cut short, else left alone."""

import json
import shutil
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from dreambooth.families.base import Family
from dreambooth.files import atomic, content_key, fault_of
from dreambooth.progress import progress_bar
from dreambooth.sampling import draw, picture_seed

TEXT_CHUNK = "dreambooth"  # the PNG's text chunk that holds the settings as JSON
Settings = dict[str, Any]
NEWER: Settings = {
    "guidance_rescale": 0.0,
    "batch_size": None,
}  # what a picture of before a setting existed was drawn with


def describe(
    wanted: Sequence[tuple[str, int]], how: Mapping[str, Any], model: str, weights: str, resolution: int
) -> list[Settings]:
    """The settings of every picture of the ``wanted`` (prompt, count), in the order of their numbers.

    ``how`` is a node such as ``infer``. ``how.batch_size`` pictures are drawn at once, and where it is null those of a
    prompt, at most ``how.num_images_per_prompt``; the last bits of a picture depend on that number.
    """
    return [
        {
            "prompt": prompt,
            "negative_prompt": how["negative_prompt"],
            "model": model,
            "weights": weights,
            "seed": how["seed"],
            "prompt_index": index,
            "picture_index": picture,
            "picture_seed": picture_seed(how["seed"], index, picture),
            "num_images_per_prompt": how["num_images_per_prompt"],
            "batch_size": how["batch_size"],
            "inference_steps": how["inference_steps"],
            "unconditional_guidance_scale": float(how["unconditional_guidance_scale"]),
            "guidance_rescale": float(how["guidance_rescale"]),
            "sampler_type": how["sampler_type"],
            "resolution": resolution,
        }
        for index, (prompt, count) in enumerate(wanted)
        for picture in range(count)
    ]


def numbered_paths(folder: Path, pictures: Sequence[Settings]) -> list[Path]:
    """``00000.png``, ``00001.png``, ... for each of the pictures."""
    return [folder / f"{number:05d}.png" for number in range(len(pictures))]


def draw_missing(family: Family, folder: Path, pictures: Sequence[Settings], label: str) -> int:
    """Draw those of the pictures that ``folder`` lacks, with a bar of that ``label``; how many are new."""
    paths = numbered_paths(folder, pictures)
    batches = [batch for batch in batches_of(pictures) if not all(_whole(paths[number]) for number in batch)]
    new = sum(not _whole(path) for path in paths)
    with progress_bar(sum(map(len, batches)), label, "picture") as bar:
        bar.leave = False
        for batch in batches:
            drawn = draw_batch(family.to_pipeline(), [pictures[number] for number in batch])
            for number, image in zip(batch, drawn, strict=True):
                if not _whole(paths[number]):
                    write_picture(paths[number], image, pictures[number])
            bar.update(len(batch))
    return new


def draw_through(store: str | None, family: Family, folder: Path, pictures: Sequence[Settings], label: str) -> None:
    """As ``draw_missing``, by way of the folder of these very pictures in ``store``, which other runs share."""
    if store is None:
        draw_missing(family, folder, pictures, label)
        return
    same = [{**picture, "model": ""} for picture in pictures]
    shared = Path(store).expanduser() / content_key(json.dumps(same))[:16]
    while (foreign := foreign_picture(shared, pictures)) is not None:
        foreign.unlink()  # of another content than the folder's name says: damaged
    draw_missing(family, shared, pictures, label)
    for source, path in zip(numbered_paths(shared, pictures), numbered_paths(folder, pictures), strict=True):
        if not _whole(path):
            with atomic(path) as temporary:
                shutil.copyfile(source, temporary)


def missing(folder: Path, pictures: Sequence[Settings]) -> bool:
    """Whether there is anything to draw."""
    return not all(_whole(path) for path in numbered_paths(folder, pictures))


def _whole(path: Path) -> bool:
    """Whether a picture is there, and not cut short."""
    return path.exists() and fault_of(path) is None


def foreign_picture(folder: Path, pictures: Sequence[Settings]) -> Path | None:
    """The first numbered picture in ``folder`` that has not the settings it would be drawn with."""
    for path, settings in zip(numbered_paths(folder, pictures), pictures, strict=True):
        if path.exists() and {**read_settings(path), "model": ""} != {**settings, "model": ""}:
            return path
    return None


def read_settings(path: Path) -> Settings:
    """The settings that a picture was drawn with, as ``describe`` gives them; empty when it does not say."""
    try:
        with PngImageFile(path) as picture:  # Image.open refuses to look at a grid as large as they can be
            return {**NEWER, **json.loads(picture.info[TEXT_CHUNK])}
    except (OSError, SyntaxError, KeyError, ValueError):
        return {}


def batches_of(pictures: Sequence[Settings]) -> list[range]:
    """The numbers of the pictures that are drawn together, all of one prompt unless they say their ``batch_size``."""
    batches, first = [], 0
    for _, group in groupby(pictures, key=lambda picture: picture["batch_size"] or -1 - picture["prompt_index"]):
        count, size = len(list(group)), pictures[first]["batch_size"] or pictures[first]["num_images_per_prompt"]
        batches += [range(first + i, first + min(i + size, count)) for i in range(0, count, size)]
        first += count
    return batches


def draw_batch(pipeline: Any, pictures: Sequence[Settings]) -> list[Image.Image]:
    """The pictures of one batch, drawn together."""
    one = pictures[0]
    return draw(
        pipeline,
        [picture["prompt"] for picture in pictures],
        [picture["picture_seed"] for picture in pictures],
        steps=one["inference_steps"],
        guidance=one["unconditional_guidance_scale"],
        guidance_rescale=one["guidance_rescale"],
        sampler_type=one["sampler_type"],
        negative_prompt=one["negative_prompt"],
        resolution=one["resolution"],
    )


def write_picture(path: Path, image: Image.Image, settings: Settings) -> None:
    """Write a picture with what it was made by, which ``read_settings`` gives back."""
    chunks = PngInfo()
    chunks.add_text(TEXT_CHUNK, json.dumps(settings))
    with atomic(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=chunks)
