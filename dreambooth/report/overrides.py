"""overrides.yaml: the command of a run, and what in its settings is not the default."""

from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from dreambooth.config import command_of, defaults
from dreambooth.files import atomic
from dreambooth.run_folder import MISSING, OVERRIDES, flatten

NO_SETTINGS = ("task", "resume", "run_dir", "report.")  # what is done with the run, and where


def record(cfg: DictConfig, folder: Path) -> None:
    """Write overrides.yaml of a run: ``command`` (null: unknown) and ``changed``, key → [default, this run's].

    The default is the tree composed without an override. Call it on the first rank only.
    """
    found = {"command": command_of(cfg), "changed": differences(defaults(), cfg)}
    with atomic(folder / OVERRIDES) as temporary:
        text = yaml.safe_dump(found, sort_keys=False, allow_unicode=True, default_flow_style=None, width=10**6)
        temporary.write_text(text, encoding="utf-8")


def differences(standard: DictConfig, cfg: DictConfig) -> dict[str, list[Any]]:
    """Keys whose value was changed → [default, this one], both resolved.

    A value that only follows a changed one (``${…}`` in both trees) is no change of its own. A node that was switched
    off or on is one entry, and "(absent)" stands for a key that a tree does not have.
    """
    raw = [flatten(OmegaConf.to_container(tree, resolve=False)) for tree in (standard, cfg)]
    trees: list[Any] = [OmegaConf.to_container(tree, resolve=True) for tree in (standard, cfg)]
    changed = [key for key in {**raw[0], **raw[1]} if raw[0].get(key, MISSING) != raw[1].get(key, MISSING)]
    values = {key: [_at(tree, key) for tree in trees] for key in changed if not key.startswith(NO_SETTINGS)}
    return {key: pair for key, pair in values.items() if not any(_within(key, other) for other in values)}


def _within(key: str, other: str) -> bool:
    return key.startswith(f"{other}.")


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return MISSING
        tree = tree[part]
    return tree
