"""Folders of pictures, atomic writes and content keys."""

import hashlib
import logging
import os
import shutil
import socket
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dreambooth.errors import UserError

WRITE_ERRORS = ("No space left", "inline_container", "iostream error")
log = logging.getLogger(__name__)

PICTURE_SUFFIXES = set(".avif .bmp .gif .heic .heif .jp2 .jpeg .jpg .png .tif .tiff .webp".split())
MASK = "_mask.png"  # 0_mask.png beside 0.jpg is its mask, and no picture


def list_pictures(folder: Path, key: str, known: Collection[str] | None = ()) -> list[Path]:
    """The pictures of a folder, sorted by name, each one decoded to the end.

    Hidden files and folders are skipped, other files reported once and ignored, except those ``known`` by name (None:
    all of them).
    Raises UserError, which names the config ``key``: no such folder, no picture, or all unreadable pictures at once.
    """
    paths = picture_paths(folder, key, known)
    faults = {path.name: fault for path in paths if (fault := fault_of(path))}
    if faults:
        names = ", ".join(f"{name} ({fault})" for name, fault in faults.items())
        many = f"{len(faults)} of {len(paths)} pictures" if len(paths) > 1 else "the only picture"
        raise UserError(f"{key}: {many} cannot be read in {folder}: {names}; repair or remove")
    if not paths:
        raise UserError(f"{key}: there is no picture in {folder}; put some .jpg or .png there or name another folder")
    return paths


def picture_paths(folder: Path, key: str, known: Collection[str] | None = ()) -> list[Path]:
    """As ``list_pictures``, but nothing is decoded and an empty folder is no error."""
    folder = Path(folder)
    try:
        files = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_dir())
    except OSError as error:
        raise UserError(f"{key}: cannot open {folder} ({error.strerror}); name a folder of pictures") from error
    pictures = pictures_among(files)
    others = [path.name for path in files if path not in pictures]
    if known is not None and (unknown := tuple(name for name in others if name not in known)):
        report_ignored(folder, unknown)
    return pictures


def pictures_among(files: Iterable[Path]) -> list[Path]:
    """Those of the files of one folder that are pictures by their name, and not another picture's mask."""
    found = [path for path in files if path.suffix.lower() in PICTURE_SUFFIXES]
    stems = {path.stem for path in found}
    return [path for path in found if not (path.name.endswith(MASK) and path.name.removesuffix(MASK) in stems)]


def distinct_names(folders: Iterable[str | Path]) -> list[str]:
    """The last part of each path, with a number from the second of one name on."""
    names: list[str] = []
    for folder in folders:
        name = Path(folder).name
        again = sum(other == name or other.startswith(f"{name} ") for other in names)
        names.append(f"{name} {again + 1}" if again else name)
    return names


@cache
def report_ignored(folder: Path, names: tuple[str, ...]) -> None:
    """Say once in a process which files of a folder are not taken for pictures."""
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    hint = "; model.data.masks=files takes the masks of photos" * any(name.endswith(MASK) for name in names)
    log.warning("%s: not pictures, ignored: %s%s", folder, listed, hint)


def fault_of(path: Path) -> str | None:
    """Why a file is no readable picture, or None when it is one."""
    try:
        status = path.stat()
    except OSError as error:
        return error.strerror
    return _fault(path, status.st_size, status.st_mtime_ns) if status.st_size else "0 bytes"


@cache
def _fault(path: Path, size: int, modified: int) -> str | None:
    """The fault of a file in one state, so that a process decodes it once to check it."""
    try:
        open_picture(path)
    except UnidentifiedImageError:
        return "not a picture PIL knows"
    except Exception as error:  # decoders raise whatever they meet: OSError, SyntaxError, struct.error, ...
        return str(error).partition("\n")[0] or type(error).__name__
    return None


@contextmanager
def opened(path: Path | BinaryIO) -> Iterator[Image.Image]:
    """``Image.open`` with a higher limit: PIL takes what a telephone of 200 megapixels makes for an attack."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 2**30
    try:
        with Image.open(path) as file:
            yield file
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def open_picture(path: Path | BinaryIO) -> Image.Image:
    """A picture as 8-bit RGB, upright: EXIF-rotated, transparency over white, 16 bit scaled rather than clipped.

    Raises ValueError for 32-bit pixels, whose white may be any number.
    """
    with opened(path) as file:
        file.load()
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I;16") or (image.mode == "I" and file.format == "PNG"):
        levels = np.asarray(image, dtype=np.float64)
        image = Image.fromarray((levels / 257).round().clip(0, 255).astype(np.uint8))
    elif image.mode in ("F", "I"):
        raise ValueError("32-bit pixels have no agreed range")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    return image.convert("RGB")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling to write a file or folder at, and rename it to ``path`` on success.

    Nothing is left behind on failure. Being unable to write (full disk, read-only folder) is a UserError with the path.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _share(temporary)
        if temporary.is_dir() and path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except BaseException as error:
        if path.parent.is_dir():
            remove(temporary)
        # On a full disk torch.save and safetensors raise errors of their own.
        if isinstance(error, UserError):
            raise
        if isinstance(error, OSError) or any(sign in str(error) for sign in WRITE_ERRORS):
            reason = getattr(error, "strerror", None) or "no space left on the device?"
            raise UserError(f"cannot write {path}: {reason}; make room or name another folder") from error
        raise


@contextmanager
def alone(path: Path, doing: str, wait: bool = True) -> Iterator[None]:
    """Within, no other process makes ``path``: who comes second waits, and finds it made.

    ``doing`` is what is said meanwhile. Without ``wait``, and where the file system has no locks, the second goes on.
    """
    place = path.absolute()
    lock: Any = FileLock(place.with_name(f".{place.name}.lock"), fallback_to_soft=False)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        if wait:
            log.info("%s is being %s by another process: waiting for it", path, doing)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        log.debug("%s is not locked: %s", path, error)
    try:
        yield
    finally:
        if lock.is_locked:  # still: who waits looks whether the file that it got is the one that lies there
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def remove(path: Path) -> None:
    """Remove a file, or a folder with what is in it, if it is there. What cannot be removed of a folder stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _share(path: Path) -> None:
    """Give what was written the permissions of any new file: safetensors keeps its files to their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for file in path.rglob("*") if path.is_dir() else [path]:
        if not file.is_symlink() and file.is_file() and stat.S_IMODE(file.stat().st_mode) == 0o600:
            file.chmod(0o666 & ~mask)


def sweep(folder: Path, shared: bool = True) -> None:
    """Remove what ``atomic`` left in ``folder``, files or folders, when its process was killed.

    Of a ``shared`` folder only what a process of this machine left; else of any: a requeued job comes back elsewhere.
    """
    host = socket.gethostname()
    for path in folder.glob(f".*.{host}-*.tmp" if shared else ".*.*-*.tmp"):
        number = path.stem.rpartition("-")[2]
        # In a container each process may have the number of the one before it.
        abandoned = not shared and (f".{host}-" not in path.name or number == str(os.getpid()))
        if number.isdigit() and (abandoned or not _lives(int(number))):
            remove(path)


def _lives(process: int) -> bool:
    """Whether there is a process of that number on this machine."""
    try:
        os.kill(process, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)  # somebody else's takes no signal
    return True


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, the same on every machine."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def content_key(*parts: object) -> str:
    """A short name, equal for equal parts: numbers, strings, tuples or None."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def file_hash(path: Path) -> str:
    """The hash of a file's bytes."""
    return hash_bytes(path.read_bytes())


def hash_bytes(data: bytes) -> str:
    """As ``file_hash``, of a file that was read already."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()
