"""Models that are nowhere, and the hub where there is no network: one line of ours, no retries. Needs no torch."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dreambooth.errors import UserError
from dreambooth.task_table import task_of

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
INDEX = "model_index.json"
PATIENCE = 10  # seconds that the hub has for an answer


def check(cfg: Any) -> None:
    """Raise UserError when ``model.from_pretrained`` is neither a folder nor a hub id, nor one that can be had.

    The latter: ``HF_HUB_OFFLINE`` is set, and it is not cached.
    ``model.restore_from_path`` is not asked for: it is read only while regularization pictures are missing.
    """
    source = str(cfg.model.from_pretrained)
    if _needs_none(cfg):
        return
    if not HUB_ID.fullmatch(source):
        raise UserError(absent(source))
    from huggingface_hub import constants  # half a second

    if constants.HF_HUB_OFFLINE and (command := download(cfg)):
        raise UserError(
            f"model.from_pretrained={source} is not in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: "
            f"name a folder, or type where there is a network: {command}"
        )


def download(cfg: Any) -> str | None:
    """The command that puts ``model.from_pretrained`` into the hub's cache; None when it is there or no hub id."""
    source, revision = str(cfg.model.from_pretrained), cfg.model.revision
    if _needs_none(cfg) or not HUB_ID.fullmatch(source):
        return None
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(source, INDEX, revision=revision), str):
        return None
    return f"hf download {source}" + (f" --revision {revision}" if revision else "")


def _needs_none(cfg: Any) -> bool:
    """Whether no hub is asked: the task loads no base, or one that is here."""
    source = str(cfg.model.from_pretrained)
    return not task_of(cfg.task).loads_base or source == "pocket" or Path(source).expanduser().is_dir()


def absent(source: str) -> str:
    """The line about a model that is no folder and cannot be a hub id."""
    return f"No model at '{source}': type a folder that exists, a hub id like owner/name, or pocket"


def reachable() -> bool:
    """Whether the hub answers one request. Its own functions ask six times, for half a minute a file."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # of the client's library, whichever that is
        return False
    return True


@contextmanager
def cache_only() -> Iterator[None]:
    """Within, the libraries find in the hub's cache what they look for, or nowhere."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def not_cached(error: BaseException | None) -> bool:
    """Whether it is for want of a file in the cache that something could not be loaded."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    while error is not None:
        if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def silent() -> Iterator[None]:
    """Within, no library logs or warns: an error says it all."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
