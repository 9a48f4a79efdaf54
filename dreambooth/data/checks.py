"""What a user can have got wrong in ``model.data``, found before anything is drawn, encoded or written."""

import tempfile
from pathlib import Path

from dreambooth.errors import UserError


def whole_number(value: object, least: int, key: str) -> None:
    """Raise UserError unless the value of ``key`` is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{key}={value} is not a whole number of at least {least}; type {key}={least} or more")


def resolution(value: int, factor: int) -> None:
    """Raise UserError unless pictures of this side make whole latent cells of ``factor`` pixels."""
    key = "model.data.resolution"
    whole_number(value, factor, key)
    if value % factor:
        below = value - value % factor
        raise UserError(
            f"{key}={value} is not a multiple of {factor}, the pixels that a latent cell spans; "
            f"type {key}={below} or {key}={below + factor}"
        )


def prompt(text: object, key: str) -> None:
    """Raise UserError for an empty prompt."""
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{key} is empty; type for example {key}='a photo of a dog'")


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
