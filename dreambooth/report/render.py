"""From data to a file: the templates, in which everything that is not theirs is escaped."""

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dreambooth import __version__
from dreambooth.files import atomic
from dreambooth.report.wording import FILTERS

TEMPLATES = Path(__file__).resolve().parent / "templates"


def render(template: str, **data: Any) -> str:
    """The text of a page; ``StrictUndefined`` makes a name that nobody filled in an error instead of a gap."""
    return _environment().get_template(template).render(version=__version__, script_hash=_script_hash(), **data)


def write(path: Path, text: str) -> Path:
    """Write a page all or nothing; UserError when the folder cannot be written."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


@cache
def _environment() -> Environment:
    loader = FileSystemLoader(TEMPLATES)
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters.update(FILTERS)
    return made


def _script_hash() -> str:
    """What the page's content policy names: no script runs but ours, whatever a prompt holds."""
    script = _environment().get_template("sort.js").render().encode()
    return "sha256-" + base64.b64encode(hashlib.sha256(script).digest()).decode()
