"""Pictures of the class, drawn by the untouched model: the prior that the subject must not displace.

A picture is a slot: an index with a seed and a name of its own. The unit of work is a chunk: ``num_images_per_prompt``
consecutive slots, always drawn together, because the bits of a picture depend on the size of its batch. Chunk j
belongs to rank j % world; of an incomplete chunk all are drawn and the missing ones written. So the same set comes out
of any number of ranks and interruptions. A manifest names what drew the set and which slots are drawn ones; every
other picture is the user's own.
"""

import json
import logging
from collections.abc import Callable, Mapping
from itertools import count, islice
from pathlib import Path
from typing import Any

from dreambooth.errors import UserError
from dreambooth.files import alone, atomic, fault_of, picture_paths, sweep
from dreambooth.noise import seed_of
from dreambooth.picture_files import NEWER
from dreambooth.progress import progress_bar
from dreambooth.sampling import draw

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
KEY = "model.data.regularization_dir"
IDENTITY = {  # what two pictures of one set must share: the manifest's name, and the key that a user types
    "base": "model.from_pretrained or model.restore_from_path",
    "prompt": "model.data.regularization_prompt",
    "sampler_type": "model.data.sampler.sampler_type",
    "inference_steps": "model.data.sampler.inference_steps",
    "unconditional_guidance_scale": "model.data.sampler.unconditional_guidance_scale",
    "guidance_rescale": "model.data.sampler.guidance_rescale",
    "resolution": "model.data.resolution",
}

WEIGHTS = "weights"  # in the manifest beside a ``base`` that is a path: the fingerprint of what lay there


def slot_name(index: int) -> str:
    """The file name of a slot."""
    return f"{index:05d}.png"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, or None; UserError when it cannot be read."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):  # not readable, not text or not JSON: refused below, as JSON of another kind is
        manifest = None
    keys = {*IDENTITY, "seed", "num_images_per_prompt", "slots"} - NEWER.keys()
    if isinstance(manifest, dict) and keys <= manifest.keys() and isinstance(manifest["slots"], list):
        count = manifest["num_images_per_prompt"]
        if all(type(number) is int and number >= 0 for number in (*manifest["slots"], count)) and count:
            return {**NEWER, **manifest}
    raise UserError(f"{path} is no manifest; delete it to keep the pictures as your own, or delete {folder}")


def inspect(folder: Path, settings: dict[str, Any]) -> tuple[list[Path], list[int], dict[str, Any] | None]:
    """The user's own pictures, the drawn slots that are whole, and the manifest. Nothing is written.

    Raises UserError when the drawn pictures are of another base, prompt or sampler, or an own picture is unreadable.
    """
    # Files before the manifest: a process that fills the folder now names its slots before it draws them.
    paths = picture_paths(folder, KEY, known=(MANIFEST,)) if folder.exists() else []
    manifest = read_manifest(folder)
    slots = {slot_name(index): index for index in manifest["slots"]} if manifest else {}
    own = [path for path in paths if path.name not in slots]
    faults = {path.name: fault for path in paths if (fault := fault_of(path))}
    unreadable = ", ".join(f"{name} ({fault})" for name, fault in faults.items() if name not in slots)
    if unreadable:
        raise UserError(f"{KEY}: pictures cannot be read in {folder}: {unreadable}; repair or remove")
    drawn = sorted(slots[path.name] for path in paths if path.name in slots and path.name not in faults)
    if manifest and drawn:
        refuse_other(folder, manifest, settings)
    return own, drawn, manifest


def refuse_other(
    folder: Path, manifest: dict[str, Any], settings: dict[str, Any], identity: Mapping[str, str] = IDENTITY
) -> None:
    """Raise UserError with the differences when a manifest names another base, prompt or sampler."""
    other = [
        f"{key} is {settings[name]!r}, the set has {manifest[name]!r}"
        for name, key in identity.items()
        if manifest.get(name, settings[name]) != settings[name]
    ]
    if other:
        raise UserError(
            f"the pictures in {folder} were drawn otherwise ({'; '.join(other)}); "
            f"type another {KEY}=..., or delete that folder to draw them anew"
        )


def plan(own: list[Path], drawn: list[int], num_images: int) -> list[int]:
    """The slots still to draw: the first free ones, as many as own and drawn pictures fall short of ``num_images``."""
    taken = {path.name for path in own} | {slot_name(index) for index in drawn}
    free = (index for index in count() if slot_name(index) not in taken)
    return list(islice(free, max(0, num_images - len(own) - len(drawn))))


def fill(
    pipeline_source: Callable[[], Any],
    folder: Path,
    num_images: int,
    settings: dict[str, Any],
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], None] = lambda: None,
    fingerprint: Callable[[], str] | None = None,
) -> int:
    """Draw what ``folder`` lacks of ``num_images`` pictures; the number drawn by all ranks together.

    ``settings`` are those of ``IDENTITY``, ``seed`` and ``num_images_per_prompt``; ``pipeline_source`` is called only
    by a rank that draws. A set that was begun with another seed goes on with its own. ``fingerprint`` is for a model
    whose ``base`` is only a name: asked when something is missing, as another model may lie there by then.

    Of two processes that would fill one folder at once the second waits for the first. Not where it has other ranks:
    their barrier would not wait as long as a set may take.
    """
    own, drawn, _ = inspect(folder, settings)
    alike = (folder, num_images, settings, rank, world, barrier, fingerprint)
    if rank or not plan(own, drawn, num_images):  # a whole set may lie where nobody can write
        return _fill(pipeline_source, *alike)
    with alone(folder, "filled", wait=world == 1):
        return _fill(pipeline_source, *alike)


def _fill(
    pipeline_source: Callable[[], Any],
    folder: Path,
    num_images: int,
    settings: dict[str, Any],
    rank: int,
    world: int,
    barrier: Callable[[], None],
    fingerprint: Callable[[], str] | None,
) -> int:
    own, drawn, manifest = inspect(folder, settings)
    missing = plan(own, drawn, num_images)
    if manifest and drawn:
        settings = {**settings, "seed": manifest["seed"]}
        broken = sum(index in manifest["slots"] for index in missing)
        if broken:
            log.info("%s: drawn again, because missing or broken: %d pictures", folder, broken)
    barrier()  # until here every rank has seen the same folder
    if missing and rank == 0:
        if fingerprint is not None:
            settings = {**settings, WEIGHTS: fingerprint()}
            refuse_other(folder, manifest if manifest and drawn else {}, settings, {WEIGHTS: IDENTITY["base"]})
        with atomic(folder / MANIFEST) as path:  # names the slots before the first is drawn
            path.write_text(json.dumps({**settings, "slots": sorted(drawn + missing)}, indent=2) + "\n")
    barrier()
    chunks = sorted({index // settings["num_images_per_prompt"] for index in missing})
    mine = [chunk for chunk in chunks if chunk % world == rank]
    if mine:
        draw_chunks(pipeline_source(), folder, mine, set(missing), settings, rank)
    barrier()
    if missing and rank == 0:
        sweep(folder)
    return len(missing)


def draw_chunks(
    pipeline: Any, folder: Path, chunks: list[int], missing: set[int], settings: dict[str, Any], rank: int
) -> None:
    """Draw whole chunks and write those of their slots that are missing."""
    size = settings["num_images_per_prompt"]
    mine = [index for chunk in chunks for index in range(chunk * size, (chunk + 1) * size) if index in missing]
    with progress_bar(len(mine), "drawing regularization pictures", "picture", rank) as bar:
        for chunk in chunks:
            slots = range(chunk * size, (chunk + 1) * size)
            pictures = draw(
                pipeline,
                [settings["prompt"]] * size,
                [seed_of(settings["seed"], index, "regularization") for index in slots],
                steps=settings["inference_steps"],
                guidance=settings["unconditional_guidance_scale"],
                guidance_rescale=settings["guidance_rescale"],
                sampler_type=settings["sampler_type"],
                resolution=settings["resolution"],
            )
            for index, picture in zip(slots, pictures, strict=True):
                if index in missing:
                    with atomic(folder / slot_name(index)) as path:
                        picture.save(path, format="PNG")
                    bar.update()
