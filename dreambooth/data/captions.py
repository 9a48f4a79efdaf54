"""What each photo shows, in words: the instance prompt, a .txt beside the photo, or its line of a .jsonl."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dreambooth.errors import UserError
from dreambooth.files import PICTURE_SUFFIXES

KEY = "model.data.captions"
SIDECAR = "sidecar"
TEXTS = ("text", "caption")  # what a line of a .jsonl may call it


def caption_files(folder: Path, captions: str | None) -> set[str]:
    """The names of the captions that may lie in a folder of pictures."""
    if captions is None:
        return set()
    pictures = (path for path in folder.glob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
    return {path.with_suffix(".txt").name for path in pictures} if captions == SIDECAR else {Path(captions).name}


def read_captions(paths: Sequence[Path], captions: str | None, template: str, prompt: str) -> list[str]:
    """The prompt of each picture of one folder: ``template`` with its words put in.

    ``{caption}`` is the picture's own text (``prompt`` where ``captions`` is None), ``{prompt}`` is ``prompt``, and
    ``{name}`` the file name without its ending, ``_`` and ``-`` as spaces. Any white space becomes one space.

    Raises UserError: a caption that is missing or empty, a file that cannot be read, a line that is not JSON or names
    a picture that is not there.
    """
    if captions is None:
        texts = dict.fromkeys(paths, prompt)
    else:
        texts = {path: _sidecar(path) for path in paths} if captions == SIDECAR else _table(paths, captions)
    return [_filled(template, text, prompt, path) for path, text in texts.items()]


def _filled(template: str, text: str, prompt: str, path: Path) -> str:
    words = {"caption": text, "prompt": prompt, "name": re.sub(r"[_-]+", " ", path.stem)}
    return " ".join(re.sub(r"\{(caption|prompt|name)\}", lambda found: words[found[1]], template).split())


def _sidecar(path: Path) -> str:
    file = path.with_suffix(".txt")
    if not file.exists():
        raise UserError(f"{KEY}={SIDECAR}: {path} has no {file.name} beside it; write one, or type {KEY}=null")
    return _not_empty(_text(file), file)


def _table(paths: Sequence[Path], captions: str) -> dict[Path, str]:
    """The text of each picture from a .jsonl, which lies beside the pictures if only its name is given."""
    beside = paths[0].parent
    file = Path(captions).expanduser()
    file = beside / file if file.name == captions else file
    found: dict[str, str] = {}
    for number, line in enumerate(_text(file).splitlines(), 1):
        if not line.strip():
            continue
        name, text = _entry(line, f"{file}, line {number}")
        if name in found or not any(path.name == name for path in paths):
            fault = "a second time" if name in found else f"which is no picture in {beside}"
            raise UserError(f"{KEY}: {file}, line {number} names {name}, {fault}; correct or remove the line")
        found[name] = text
    missing = [path.name for path in paths if path.name not in found]
    if missing:
        more = f" and {len(missing) - 1} more" * (len(missing) > 1)
        raise UserError(f"{KEY}: {file} has no line for {missing[0]}{more}; add one, or move the picture away")
    return {path: found[path.name] for path in paths}


def _entry(line: str, place: str) -> tuple[str, str]:
    try:
        entry: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"{KEY}: {place} is not JSON ({str(error).partition(':')[0]}); correct it") from None
    text = next((entry[key] for key in TEXTS if key in entry), None) if isinstance(entry, dict) else None
    if not isinstance(text, str) or not isinstance(entry.get("file_name"), str):
        raise UserError(f'{KEY}: {place} lacks a word; it should read {{"file_name": "0.png", "text": "a photo"}}')
    return entry["file_name"], _not_empty(text, place)


def _not_empty(text: str, place: object) -> str:
    if not text.strip():
        raise UserError(f"{KEY}: {place} has an empty caption; write what the picture shows")
    return text


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"{KEY}: {file} cannot be read ({reason}); name a text file") from None
