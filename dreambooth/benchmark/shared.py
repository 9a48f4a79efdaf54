"""Trainings that several benchmarks have in common: the same subject under the same settings is trained once.

With ``benchmark.runs_dir`` a subject's run lies there, under a name that its settings decide, and a benchmark's folder
holds a link to it, so that everything reads it as if it lay in place.
"""

import hashlib
import json
import os
from contextlib import AbstractContextManager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from dreambooth.errors import UserError
from dreambooth.files import alone
from dreambooth.run_folder import flatten
from dreambooth.run_id import irrelevant


def settings_key(tree: DictConfig) -> str:
    """A hash of the resolved settings that decide what is trained and measured."""
    settings = flatten(OmegaConf.to_container(tree, resolve=True))
    relevant = {key: value for key, value in settings.items() if not irrelevant(f"{key}={value}")}
    return hashlib.blake2b(json.dumps(relevant, sort_keys=True).encode(), digest_size=6).hexdigest()


def link(place: Path, run: Path) -> None:
    """Make ``place`` a link to the folder ``run``, which need not exist yet; relative, so that both may be moved.

    Raises:
        UserError: there is another run, or a link to one.
    """
    target = os.path.relpath(run, place.parent)
    if place.is_symlink() and os.readlink(place) == target:
        return
    if place.is_symlink() or place.exists():
        raise UserError(
            f"{place} is a run with other settings, or from before benchmark.runs_dir: type the old values to go on "
            "with it, or hydra.run.dir=ANOTHER_FOLDER"
        )
    place.parent.mkdir(parents=True, exist_ok=True)
    run.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)


def claimed(run: Path) -> AbstractContextManager[None]:
    """Within, no other process trains ``run``: who comes second waits, and finds it finished."""
    return alone(run, "trained")
