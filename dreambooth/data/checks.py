"""What a user can have got wrong about folders and sizes, found before anything is drawn, encoded or written."""

import tempfile
from pathlib import Path
from typing import Any

from dreambooth.errors import UserError
from dreambooth.files import list_pictures


def photos(data: Any) -> None:
    """Raise UserError unless the folders of photos that ``model.data`` names can be read to the end of each picture."""
    subjects, place = data.get("subjects"), "model.data"
    for number, entry in enumerate(subjects or [data]):
        if (folder := entry.get("instance_dir")) and not data.get("instance_shards"):
            key = f"{place}.subjects[{number}].instance_dir" if subjects else f"{place}.instance_dir"
            list_pictures(Path(folder).expanduser(), key, known=None)


def resolution(value: int, factor: int, key: str = "model.data.resolution") -> None:
    """Raise UserError unless pictures of this side make whole latent cells of ``factor`` pixels."""
    if value % factor:
        below = value - value % factor
        sizes = " or ".join(f"{key}={size}" for size in (below, below + factor) if size)
        raise UserError(
            f"{key}={value} is not a multiple of {factor}, the pixels that a latent cell spans; type {sizes}"
        )


def bucket(resolution: int, multiple: int) -> None:
    """Raise UserError unless a square of this side, of whole latent cells, is halved evenly by every network."""
    if resolution % multiple:
        below = resolution - resolution % multiple
        sizes = " or ".join(f"model.data.resolution={size}" for size in (below, below + multiple) if size)
        raise UserError(
            f"model.data.buckets=true: model.data.resolution={resolution} is not a multiple of {multiple}, as the "
            f"sides of a bucket are for this model; type {sizes}"
        )


def apart(folder: Path, other: Path, key: str) -> None:
    """Raise UserError when two folders are one."""
    if folder.resolve() == other.resolve():
        raise UserError(f"{key}: {folder} holds the subject; type another {key}=... for pictures of its class")


def writable(folder: Path, key: str) -> None:
    """Raise UserError unless ``folder`` exists and can be written, or can be made. Leaves nothing behind."""
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"{key}: {nearest} is a file, so {folder} cannot be a folder; type another {key}=...")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise UserError(f"{key}: {folder} cannot be written ({error.strerror}); type another {key}=...") from error
