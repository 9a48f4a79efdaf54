"""The composed tree: where conf/ lies, what is checked before anything expensive, and how to instantiate a node.

Rules for the tasks: ``cfg.run_dir`` is always set, an absolute path as a string (Hydra's run folder under the command,
the folder of the same overrides under ``compose``; change it with ``hydra.run.dir=DIR`` in both); cfg is read-only; and
nodes are instantiated with ``build``, which lets a UserError through as it is.
"""

import hashlib
import re
import shlex
import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from functools import cache, lru_cache, partial
from inspect import signature
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dreambooth import nearest, own_cards, rules, slurm
from dreambooth.errors import UserError
from dreambooth.prompts import phrase

_HERE = Path(__file__).resolve().parent
CONF = next(folder for folder in (_HERE / "conf", _HERE.parent / "conf") if folder.is_dir())  # wheel, or checkout
SLUG_BYTES = 100  # file systems take names of 255, and suffixes come to this one
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, ValueError)
_COMMANDS: dict[int, str] = {}  # of the settled trees that are alive, by identity: the tree itself stays the settings


def compose(overrides: list[str] | None = None) -> DictConfig:
    """The tree that ``dreambooth *overrides`` would run; raises UserError in one line, as the command does."""
    register_resolvers()
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            cfg = hydra.compose("config", overrides=overrides or [], return_hydra_config=True)
            node, folder = cfg.hydra, Path(cfg.hydra.run.dir).absolute()
            tree = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
            return settle(tree, node, str(folder))
    except COMPOSITION_ERRORS as error:
        raise UserError(explain(error)) from error


def defaults() -> DictConfig:
    """The tree without an override, within the command too, where Hydra is initialized already; of unknown run_dir."""
    return hydra.compose("config") if GlobalHydra.instance().is_initialized() else compose()


def settle(cfg: DictConfig, hydra_node: Any, run_dir: str) -> DictConfig:
    """Check the task's tree against the cards it was composed from, fill in ``run_dir``, make it read-only.

    Runs while Hydra is initialized, since the cards are composed once more without the experiment: a key that only
    the experiment knows is misspelt, which Hydra by itself takes in silence.
    """
    if cfg.run_dir is not None:
        raise UserError("run_dir is filled in; choose the run folder with hydra.run.dir=DIR")
    cfg.run_dir = run_dir
    overrides = list(hydra_node.overrides.task)
    choices = hydra_node.runtime.choices
    picked = {group: choices[group] for group in groups() if group != "experiment"}
    added = [override for override in overrides if override.startswith("+")]
    places = tuple(str(each.path) for each in hydra_node.runtime.config_sources)
    if keys := [key[1] for one in added if (key := re.match(r"\++([\w.]+)=", one)) and key[1] not in groups()]:
        rules.check_added(keys, _cards(places, *_typed_cards(picked)))
    if str(hydra_node.run.dir) == "":
        raise UserError("hydra.run.dir is empty; type a folder, or leave it out")
    cards = own_cards.reference(lambda some: _cards(places, *_typed_cards(some), *added), picked, _usual(), CONF)
    rules.check_nodes(_plain(cfg, resolve=False), cards)
    if _nameless(cfg):
        raise UserError(
            "model.from_pretrained is not set; type model.from_pretrained=..., or model=pocket, the shipped one"
        )
    source = f"experiment={choices.get('experiment')}: " if choices.get("experiment") else ""
    rules.check(_plain(cfg), cards, source, overrides)
    slurm.check(cfg)
    OmegaConf.set_readonly(cfg, True)
    return _typed(cfg, _command(hydra_node))


def _typed_cards(picked: Mapping[str, Any]) -> list[str]:
    return [f"{group}={'null' if card is None else card}" for group, card in picked.items()]


@lru_cache(64)  # a sweep's jobs, and a program's many trees, are mostly of the same cards
def _cards(places: tuple[str, ...], *overrides: str) -> Mapping[str, Any]:
    """The tree of these cards, which lie in these places, to compare with; while Hydra is initialized."""
    cfg = hydra.compose("config", overrides=list(overrides))
    if _nameless(cfg):  # a card of one's own may leave the model to who types it, and other values are made of it
        cfg.model.from_pretrained = ""
    return _plain(cfg)


def _nameless(cfg: DictConfig) -> bool:
    return OmegaConf.is_dict(cfg.get("model")) and OmegaConf.is_missing(cfg.model, "from_pretrained")


def command_of(cfg: DictConfig) -> str | None:
    """The ``dreambooth …`` line, quoted for a shell, that a tree was composed from; None for a copy of one.

    It is the same line whether the tree came from the command, from a launcher or from ``compose``.
    """
    return _COMMANDS.get(id(cfg))


def same_command(tree: DictConfig, cfg: DictConfig) -> DictConfig:
    """``tree``, made of ``cfg``, with the command of the latter."""
    command = command_of(cfg)
    return tree if command is None else _typed(tree, command)


def _typed(cfg: DictConfig, command: str) -> DictConfig:
    _COMMANDS[id(cfg)] = command
    weakref.finalize(cfg, _COMMANDS.pop, id(cfg), None)
    return cfg


def build(node: DictConfig, *args: Any, **kwargs: Any) -> Any:
    """Instantiate a ``_target_`` node.

    Lists and mappings arrive as Python's own. A UserError of its constructor arrives unwrapped. So does, as one, what
    a library's constructor says about its arguments, an argument that it does not have, and a package that is missing.
    """
    try:
        return _bound(instantiate(node, *args, _convert_="all", **kwargs), node)
    except HydraException as error:
        if (known := user_error(error)) is not None:
            raise known from error
        if (package := _absent_package(error)) is not None:
            absent = f"{node._target_}: the package {package} is not installed; type pip install {package}"
            raise UserError(absent) from error
        ours = str(node.get("_target_")).startswith("dreambooth.")
        if error.__cause__ is None or (ours and "unexpected keyword argument" not in str(error.__cause__)):
            raise
        place = re.search(r"full_key: (\S+)", str(error))
        raise UserError(f"{place[1] if place else 'config'}: {str(error.__cause__).splitlines()[0]}") from error


def _bound(made: Any, node: DictConfig) -> Any:
    """What was made; UserError for a ``_partial_`` whose callable would refuse what it holds, once it is called."""
    if isinstance(made, partial):
        try:
            signature(made.func).bind_partial(*made.args, **made.keywords)
        except TypeError as error:
            key = node._get_full_key(None)
            raise UserError(f"{key}: {error} of {made.func.__name__}; leave it out with ~{key}.KEY") from None
    return made


def user_error(error: BaseException | None) -> UserError | None:
    """The UserError among an exception and its causes."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error


def _absent_package(error: BaseException | None) -> str | None:
    """The package that was to be imported and is not there."""
    while error is not None and not (isinstance(error, ModuleNotFoundError) and "." not in str(error.name)):
        error = error.__cause__
    return error.name if error is not None else None


def explain(error: BaseException) -> str:
    """One line for an error of Hydra or OmegaConf, with the nearest right name."""
    within = GlobalHydra.instance().is_initialized()  # a command whose values fail, which Hydra has composed
    with nullcontext() if within else hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return nearest.explain(error, _cards((str(CONF),)), groups(), CONF)


def groups() -> list[str]:
    """The groups of config.yaml, in its order."""
    return list(_usual())


@cache
def _usual() -> dict[str, Any]:
    """The card that config.yaml picks of each of its groups."""
    entries = [dict(entry) for entry in OmegaConf.load(CONF / "config.yaml").defaults if OmegaConf.is_dict(entry)]
    cards = {str(group): card for entry in entries for group, card in entry.items()}
    return {group: card for group, card in cards.items() if not group.startswith("override ")}


def register_resolvers() -> None:
    """What YAML may call: ``${run_id:...}``, ``${settings_id:...}``, ``${slug:...}``, ``${subject:...}``.

    And ``${phrase:...}``, which leaves "a sks dog" of "a photo of a sks dog".
    """
    from dreambooth.pocket import SUBJECTS
    from dreambooth.run_id import run_id, settings_id

    OmegaConf.register_new_resolver("run_id", run_id, replace=True)
    OmegaConf.register_new_resolver("settings_id", settings_id, replace=True)
    OmegaConf.register_new_resolver("slug", slug, replace=True)
    OmegaConf.register_new_resolver("phrase", phrase, replace=True)
    OmegaConf.register_new_resolver("subject", lambda name: str(SUBJECTS / name), replace=True)


def slug(text: object) -> str:
    """A text as the name of a folder; of one of more than 100 bytes the beginning and a hash of all of it."""
    name = re.sub(r"[^\w.]+", "-", str(text)).strip("-.")
    if len(name.encode()) <= SLUG_BYTES:
        return name
    whole = hashlib.blake2b(str(text).encode(), digest_size=4).hexdigest()
    return f"{name.encode()[: SLUG_BYTES - len(whole) - 1].decode(errors='ignore')}-{whole}"


def _command(hydra_node: Any) -> str:
    cards = [
        f"--config-dir={each.path}" for each in hydra_node.runtime.config_sources if each.provider == "command-line"
    ]
    # Hydra adds its mode, and a sweep its folders, to what was typed about Hydra itself.
    typed = [one for one in hydra_node.overrides.hydra if not re.match(r"[+~]*hydra[./](mode|sweep|launcher)", one)]
    return shlex.join(["dreambooth", *cards, *hydra_node.overrides.task, *typed])


def _plain(cfg: DictConfig, resolve: bool = True) -> Mapping[str, Any]:
    tree = OmegaConf.to_container(cfg, resolve=resolve, throw_on_missing=False)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}
