"""One line for a name that does not exist, with the nearest that does."""

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from yaml import MarkedYAMLError


def nearest(name: str, options: Iterable[str]) -> str:
    """``; did you mean 'train'?``, or the options when none of them is near."""
    names = sorted(str(option) for option in options)
    close = _closest(name, names, cutoff=0.5)
    if close:
        return f"; did you mean '{close}'?"
    return f"; there are {', '.join(names)}" if names else ""


def nearest_key(key: str, tree: Mapping[str, Any]) -> str:
    """The nearest key of the tree: at the place where the wrong one stands, else of the same name elsewhere."""
    node: Any = tree
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if not isinstance(node, Mapping):
            return f"; '{'.'.join(parts[:depth])}' is a value"
        if part not in node:
            break
        node = node[part]
    else:  # it is there with the usual cards
        return ""
    here = _closest(part, [str(name) for name in node], cutoff=0.6)
    if here:
        shorter = ".".join([*parts[:depth], here])
        whole = ".".join([shorter, *parts[depth + 1 :]])
        return f"; did you mean '{whole if whole in _keys(tree) else shorter}'?"
    for name in _keys(tree):
        if name.rpartition(".")[2] == parts[-1]:
            return f"; did you mean '{name}'?"
    return nearest(part, node) if depth else nearest(key, _keys(tree))


def other_card(key: str, groups: Iterable[str], folder: Path) -> str:
    """``; model/tuning=lora has it``: a key that cards of its group know which are not in use; empty if none does."""
    for group in sorted(groups, key=len, reverse=True):
        rest = key.removeprefix(group.replace("/", ".") + ".")
        if rest == key:
            continue
        trees: dict[str, Any] = {
            path.stem: OmegaConf.to_container(OmegaConf.load(path)) for path in (folder / group).glob("*.yaml")
        }
        if cards := sorted(card for card, tree in trees.items() if isinstance(tree, dict) and rest in _keys(tree)):
            return f"; {group}={' or '.join(cards)} has it"
    return ""


def _closest(name: str, options: list[str], cutoff: float) -> str | None:
    """The most similar option; of equally similar ones that with the longest common beginning."""

    def score(option: str) -> tuple[float, int]:
        same = next((i for i, (a, b) in enumerate(zip(name, option, strict=False)) if a != b), len(name))
        return SequenceMatcher(None, name, option).ratio(), same

    best = max(options, key=score, default="")
    return best if best.startswith(name) or score(best)[0] >= cutoff else None


def keys(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of a tree and what it holds, nodes before what is in them."""
    for name, value in tree.items():
        yield prefix + str(name), value
        if isinstance(value, Mapping):
            yield from keys(value, f"{prefix}{name}.")


def _keys(tree: Mapping[str, Any]) -> list[str]:
    return [key for key, _ in keys(tree)]


def explain(error: BaseException, tree: Mapping[str, Any], groups: Iterable[str], folder: Path) -> str:
    """One line for an error of Hydra or OmegaConf.

    ``tree``, ``groups`` and the cards in ``folder`` are what the names are compared with.
    """
    text = str(error)
    inside = re.match(r"In '([^']+)'", text)
    place = f"in {inside[1]}.yaml: " if inside and inside[1] != "config" else ""
    if isinstance(error, OverrideParseException):
        hint = "write key=value" if "=" not in error.override else "quote the value: 'key=\"a, b\"'"
        return f"cannot read '{error.override}'; {hint}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, card = str(error.missing_cfg_file).rpartition("/")
        if not group:
            return f"--config-name {card}: there is no such file; leave it out, the tree is config.yaml's"
        if card.startswith("submitit_"):
            return 'hydra/launcher=slurm needs two more packages: pip install "dreambooth[slurm]"'
        return f"{place}{group}={card}: there is no such card{nearest(card, error.options or groups)}"
    wrong = re.search(r"Could not (?:override|delete from config\.) '([^']+)'", text)
    if isinstance(error, ConfigCompositionException) and wrong:
        name = wrong[1]
        if "/" in name:
            return f"{place}{name}: there is no such group{nearest(name, groups)}"
        if name.startswith("hydra."):
            return f"{place}{name}: there is no such key; the run folder is hydra.run.dir"
        near = other_card(name, groups, folder) or nearest_key(name, tree)
        return f"{place}{name}: there is no such key{near}"
    if isinstance(error, MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1}: {error.problem}"
    if text.startswith("Config group override must be"):  # Hydra does not say of which group
        return "a group is null, and null is no card: type GROUP=CARD, or leave the group as it is"
    if text.startswith("Ambiguous value"):
        return f"{text.splitlines()[0]}; quote a text with commas: 'key=\"a, b\"', or sweep with --multirun"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    where = next((line.removeprefix("full_key:").strip() for line in lines if line.startswith("full_key:")), "")
    return f"{place}{where + ': ' if where else ''}{lines[0] if lines else type(error).__name__}"
