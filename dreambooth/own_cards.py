"""Cards of a user's own (``--config-dir``), checked by the shipped ones: no card can tell its own misspelt keys."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dreambooth.errors import UserError, about
from dreambooth.nearest import nearest_key
from dreambooth.rules import MAY_BE_NULL, MISSING, OPEN, check_kind, no_node

Tree = Mapping[str, Any]
Compose = Callable[[Mapping[str, Any]], Tree]  # the tree of the cards that are picked, by group


def reference(compose: Compose, picked: Mapping[str, Any], usual: Mapping[str, Any], shipped: Path) -> Tree:
    """What a tree of the ``picked`` cards is compared with; ``usual`` are those that are picked without a word.

    That is the tree of these very cards, where all of them lie in the folder ``shipped``. In the place of another the
    usual card stands, or the shipped one of the same class; what it says of a class beyond that is the class's to know.

    Raises:
        UserError: a card of the user's own has a key that the shipped one lacks, lacks one, or has a value of another
            kind.
    """
    mine = compose(picked)
    own = [
        group for group, card in picked.items() if card is not None and not (shipped / group / f"{card}.yaml").exists()
    ]
    if not own:
        return mine
    others = {**picked, **{group: usual[group] for group in own}}
    tree = compose(others)
    for group in own:
        if (target := _target(mine, group)) not in (None, _target(tree, group)):
            others[group] = next(iter(_cards_of(target, shipped / group)), usual[group])
    tree = compose(others)
    with about(", ".join(f"{group}={picked[group]}" for group in own)):
        merged = _merged(mine, tree, "", tree)
    assert isinstance(merged, dict)
    return merged


def _target(tree: Any, group: str) -> Any:
    """The class that a group's card names, if it names one."""
    for name in group.split("/"):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree.get("_target_") if isinstance(tree, Mapping) else None


def _cards_of(target: Any, folder: Path) -> list[str]:
    """The cards of a folder that name this class themselves."""
    trees: dict[str, Any] = {path.stem: OmegaConf.load(path) for path in sorted(folder.glob("*.yaml"))}
    return [name for name, tree in trees.items() if OmegaConf.is_dict(tree) and tree.get("_target_") == target]


def _merged(mine: Any, card: Any, key: str, cards: Tree) -> Any:
    """The kinds of ``card`` and, where a class has its say, the keys of ``mine``; UserError as ``reference`` says."""
    if not isinstance(card, dict):
        if mine != MISSING:
            check_kind(key, mine, card)
        return mine if isinstance(mine, dict) and "_target_" in mine else card
    if mine is None and key.startswith(MAY_BE_NULL):
        return None
    if not isinstance(mine, dict):
        raise no_node(key, mine, card, cards)
    if mine.get("_target_") != card.get("_target_"):
        return mine
    if "_target_" not in card:
        _check_names(mine, card, key, cards)
    both = {name: _merged(mine[name], card[name], f"{key}.{name}".lstrip("."), cards) for name in mine if name in card}
    return {**mine, **both}


def _check_names(mine: Tree, card: Tree, key: str, cards: Tree) -> None:
    """Raise UserError for the first name of a node that the shipped one lacks, or the first that it alone has."""
    for name in mine:
        full = f"{key}.{name}".lstrip(".")
        added = key in OPEN and (mine[name] is None or "_target_" in mine[name])
        if name not in card and not added:
            raise UserError(f"{full}: there is no such key{nearest_key(full, cards)}")
    if key not in OPEN and (gone := next((name for name in card if name not in mine), None)) is not None:
        raise UserError(f"{key}.{gone} is not set; begin the card with defaults: [a shipped one, _self_]")
