"""What every value of the tree may be, checked before anything is loaded; each complaint is one UserError."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from dreambooth import conflicts
from dreambooth.conflicts import TEXT_OR_LIST
from dreambooth.errors import UserError
from dreambooth.nearest import nearest, nearest_key
from dreambooth.task_table import task_of
from dreambooth.values import ANYTHING, CHOICES, KINDS, NULLABLE, ONE_OR_MANY, RANGES

MISSING = "???"
PATHS = re.compile(r"name|.*(_dir|_path|\.(from_pretrained|folder|model|adapter|photos|images))")  # "" would mean "."
# What may be left out with ~: a class or function then has its own default.
DELETABLE = tuple(f"model.{name}" for name in ("optim", "tuning", "loss", "weighting", "objective", "family"))
DELETABLE += ("callbacks", "logger", "metrics")
OPEN = ("callbacks", "logger", "metrics.encoders")  # nodes of one's own may be added there
MAY_BE_NULL = ("callbacks.", "metrics.encoders.")  # the nodes there: each is left out with null


def check(tree: Mapping[str, Any], cards: Mapping[str, Any], source: str, overrides: Iterable[str]) -> None:
    """Raise UserError at the first key that the cards lack, value of another kind, or value out of range.

    ``source`` is put before a complaint about an unknown key; those can only come from an experiment. ``overrides`` are
    those that were typed.
    """
    values: dict[str, Any] = {}
    _walk(tree, cards, "", values, source, cards)
    for key, options in CHOICES.items():
        if values.get(key) is not None and values[key] not in options:
            raise UserError(f"{key}={values[key]}: there is no such choice{nearest(str(values[key]), options)}")
    for what, allowed, keys in RANGES:
        for key in keys.split():
            given = values.get(key) is not None or (key in values and key in ANYTHING)  # whose null nobody refused
            if given and not allowed(values[key]):
                raise UserError(f"{key}={values[key]}: must be {what}")
    for key, value in values.items():
        if value == "" and PATHS.fullmatch(key):
            raise UserError(f"{key} is empty; type a name, or leave it out")
    conflicts.check(values)
    conflicts.check_typed(overrides, values)
    required = task_of(values["task"]).required
    for key, value in values.items() if required else ():
        if value == MISSING and key.startswith(f"{required}."):
            raise UserError(f"{key} is not set; type {key}=..., or take the shipped subject with model=pocket")


def check_nodes(tree: Mapping[str, Any], cards: Mapping[str, Any]) -> None:
    """Raise UserError for a value in the place of keys. ``tree`` is not resolved: other values may be made of them."""

    def walk(values: Mapping[str, Any], node: Mapping[str, Any], above: str) -> None:
        for name, card in node.items():
            value, key = values.get(name), f"{above}{name}"
            if isinstance(card, dict) and isinstance(value, dict):
                walk(value, card, f"{key}.")
            elif isinstance(card, dict) and value is not None and "${" not in str(value):
                raise no_node(key, value, card, cards)

    walk(tree, cards, "")


def no_node(key: str, value: Any, card: Mapping[str, Any], cards: Mapping[str, Any]) -> UserError:
    """What to say of a value in the place of keys."""
    from dreambooth.config import groups

    group = key.replace(".", "/")
    if group in groups():
        return UserError(f"{key}={value}: {key} holds keys; a card is picked with {group}={value}")
    return UserError(f"{key}={value}: {key} holds keys; type one of them, such as {key}.{next(iter(card))}=...")


def check_added(keys: Iterable[str], tree: Mapping[str, Any]) -> None:
    """Raise UserError for a key added with ``+`` that ``tree`` lacks, unless a class or its like may take it."""
    for key in keys:
        node: Any = tree
        for depth, part in enumerate(parts := key.split(".")):
            if not isinstance(node, Mapping) or part not in node:
                if not (isinstance(node, Mapping) and "_target_" in node) and ".".join(parts[:depth]) not in OPEN:
                    raise UserError(f"+{key}: there is no such key{nearest_key(key, tree)}")
                break
            node = node[part]


def _walk(value: Any, card: Any, key: str, values: dict[str, Any], source: str, cards: Mapping[str, Any]) -> None:
    if not isinstance(card, dict):
        if card is None and isinstance(value, dict) and key.startswith("callbacks.") and "_target_" not in value:
            group = key.replace(".", "/")
            raise UserError(f"{source}{key} is null, so its keys change nothing; pick a card first, {group}=default")
        values[key] = value
        return check_kind(key, value, card)
    if value is None and key.startswith(MAY_BE_NULL):
        return None
    if not isinstance(value, dict):
        raise no_node(key, value, card, cards)
    swapped = value.get("_target_") != card.get("_target_")
    if (
        not swapped
        and not key.startswith(DELETABLE)
        and (gone := next((name for name in card if name not in value), ""))
    ):
        full = f"{key}.{gone}" if key else str(gone)
        raise UserError(f"~{full}: it cannot be left out; type a value, such as {full}={card[gone]}")
    for name, child in value.items():
        full = f"{key}.{name}" if key else str(name)
        if name in card:
            _walk(child, card[name], full, values, source, cards)
        elif not swapped and not (key == "callbacks" and isinstance(child, dict) and "_target_" in child):
            raise UserError(f"{source}{full}: there is no such key{nearest_key(full, cards)}")
    return None


def check_kind(key: str, value: Any, card: Any) -> None:
    """Raise UserError for a value of another kind than its key has: that of the ``card``'s value, or a listed one."""
    kind = NULLABLE.get(key, type(card))
    if value in (None, MISSING) and (key in NULLABLE or value == card):
        return
    if key in ANYTHING or card == MISSING or kind is type(None):
        kind = str if card == MISSING else object
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        bool: isinstance(value, bool),
        int: number and isinstance(value, int),
        float: number,
        str: isinstance(value, str) or number or (key in ONE_OR_MANY and isinstance(value, list)),
        list: isinstance(value, list) or (key in TEXT_OR_LIST and isinstance(value, str)),
        object: True,
    }
    if kind is str and number and key != "name" and PATHS.fullmatch(key):  # 2024_06 arrives as 202406
        raise UserError(f"{key}={value}: is read as a number; quote the name as it was typed: {key}='\"{value}\"'")
    if not fits[kind]:
        raise UserError(f"{key}={value}: must be {KINDS[kind]}")
