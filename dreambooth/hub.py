"""Models that are nowhere, or would have to be downloaded without a network: said at once. Needs no torch."""

import re
from pathlib import Path
from typing import Any

from dreambooth.errors import UserError

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
INDEX = "model_index.json"
TASKS = ("train", "prepare", "benchmark")


def check(cfg: Any) -> None:
    """Raise UserError when ``model.from_pretrained`` is neither a folder nor a hub id, nor one that can be had.

    The latter: ``HF_HUB_OFFLINE`` is set, and it is not cached.
    ``model.restore_from_path`` is not asked for: it is read only while regularization pictures are missing.
    """
    source, revision = str(cfg.model.from_pretrained), cfg.model.revision
    if cfg.task not in TASKS or source == "pocket" or Path(source).expanduser().is_dir():
        return
    if not HUB_ID.fullmatch(source):
        raise UserError(absent(source))
    from huggingface_hub import constants, try_to_load_from_cache  # half a second

    if constants.HF_HUB_OFFLINE and not isinstance(try_to_load_from_cache(source, INDEX, revision=revision), str):
        at = f" --revision {revision}" if revision else ""
        raise UserError(
            f"model.from_pretrained={source} is not in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: "
            f"name a folder, or type where there is a network: hf download {source}{at}"
        )


def absent(source: str) -> str:
    """The line about a model that is no folder and cannot be a hub id."""
    return (
        f"No model at '{source}': type a folder that exists, a hub id like owner/name, or pocket "
        "(model.from_pretrained, model.restore_from_path or infer.model)"
    )
