"""The settings by which a finished run is drawn and measured: its own, with the command's word over them."""

import shlex
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dreambooth.config import command_of
from dreambooth.run_folder import CONFIG, settings_in

NODES = ("evaluate", "metrics", "infer")


def run_of(model: str) -> Path | None:
    """The folder that ``infer.model`` names, if it is a run."""
    folder = Path(model).expanduser()
    return folder if (folder / CONFIG).exists() else None


def settings_of_run(cfg: DictConfig, run: Path) -> DictConfig:
    """The tree of a run, and over its ``evaluate``, ``metrics`` and ``infer`` what the command typed.

    A command that names no card has those of its default model, which may be another than the run's: only a key or a
    card that was typed counts (an experiment's may be any). Machine (``trainer``) and task are the command's.
    """
    own = settings_in(run)
    asked: Any = OmegaConf.to_container(cfg, resolve=False)
    typed = words_of(cfg)
    for node in NODES:
        if typed is None or node in typed or "experiment" in typed or node not in own:
            own[node] = asked[node]
    for key in typed or ():
        if key.split(".")[0] in NODES and "." in key:
            _take_over(own, key, asked)
    own.infer.model = asked["infer"]["model"]
    own.trainer, own.task, own.run_dir = asked["trainer"], asked["task"], str(run)
    return own


def _take_over(own: Any, key: str, asked: Any) -> None:
    """Give ``own`` the value that ``key`` has in ``asked``; none where it was typed with ~."""
    try:
        OmegaConf.update(own, key, reduce(getitem, key.split("."), asked), force_add=True)
    except KeyError:
        node, _, name = key.rpartition(".")
        (OmegaConf.select(own, node) or {}).pop(name, None)


def by_untyped_cards(cfg: DictConfig, side: int, *cards: str) -> bool:
    """Whether pictures of ``side`` pixels would meet cards of the default model, a small one, that nobody chose."""
    typed = words_of(cfg)
    chosen = typed is None or any(key in typed for key in ("model", "experiment", *cards))
    return not chosen and side > cfg.model.data.resolution


def words_of(cfg: DictConfig) -> set[str] | None:
    """The keys and groups of a command's words; None for a tree that came from no command."""
    command = command_of(cfg)
    return None if command is None else {word.lstrip("+~").partition("=")[0] for word in shlex.split(command)[1:]}
