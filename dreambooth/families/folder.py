"""Diffusers folders as they are published: found, checked, read and written."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from dreambooth.errors import UserError
from dreambooth.families.base import own_weights
from dreambooth.files import atomic
from dreambooth.hub import HUB_ID, INDEX, absent, cache_only, reachable, silent

WEIGHTS = re.compile(r"(?:diffusion_pytorch_)?model(?:\.([\w-]+?))?(?:-\d{5}-of-\d{5})?\.safetensors")
FAILURES = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)


def locate(source: str, revision: str | None = None, variant: str | None = None) -> Path:
    """The local folder of a model: ``pocket``, a folder, or a hub id (downloaded without pickled weights)."""
    if source == "pocket":
        from dreambooth.pocket import WEIGHTS as shipped

        return shipped
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(source):
        raise UserError(absent(source))
    network = reachable()
    try:
        with silent(), nullcontext() if network else cache_only():
            return Path(DiffusionPipeline.download(source, revision=revision, variant=variant, use_safetensors=True))
    except FAILURES as error:
        at = f" at revision {revision}" if revision else ""
        if not network:
            raise UserError(
                f"'{source}' is no folder here, and the hub's cache does not have it{at}: type a folder that exists, "
                f"or where there is a network: hf download {source}{at.replace(' at revision', ' --revision')}"
            ) from error
        raise UserError(
            f"'{source}' is no folder here, and the hub did not give it{at} ({root_cause(error)}): "
            "type a folder that exists, or check the id and the revision"
        ) from error


def check(folder: Path, pipeline: str, classes: dict[str, type]) -> None:
    """Raise UserError unless the folder holds this pipeline with components of these classes."""
    index = read_json(folder / INDEX)
    for name, wanted in {"_class_name": pipeline, **{name: kind.__name__ for name, kind in classes.items()}}.items():
        found = index.get(name)
        found = found[-1] if isinstance(found, list) else found  # ["diffusers", "AutoencoderKL"]
        if found != wanted:
            raise UserError(f"{folder / INDEX}: {name} is {found}, this family needs {wanted}; choose another model")
    for name in (*classes, "scheduler"):
        if not (folder / name).is_dir():
            raise UserError(f"{folder} has no folder '{name}' although its {INDEX} names it; copy the model anew")


def load(folder: Path, kind: type, variant: str | None = None) -> Any:
    """A network of class ``kind`` in float32 from its component folder: safetensors only, no weight missing."""
    which = kind_of_weights(folder, variant)
    try:
        with quiet():
            network, report = kind.from_pretrained(  # type: ignore[attr-defined]
                folder,
                variant=which,
                use_safetensors=True,
                torch_dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
            )
    except FAILURES as error:
        raise UserError(f"{folder} cannot be loaded: {first_line(error)}; copy or download it anew") from error
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        raise UserError(f"{folder} lacks {len(absent)} weights, such as {absent[0]}; copy or download it anew")
    return network.eval()


def kind_of_weights(folder: Path, variant: str | None) -> str | None:
    """The variant to load: the one asked for, else the plain files (None), else the only one that is there."""
    found = {match[1] for path in folder.iterdir() if (match := WEIGHTS.fullmatch(path.name))}
    if variant in found:
        return variant
    if None in found:
        return None
    if len(found) == 1:
        return found.pop()
    if found:
        names = ", ".join(sorted(str(name) for name in found))
        raise UserError(f"{folder} holds the variants {names}; choose one with model.variant=")
    if list(folder.glob("*.bin")):
        raise UserError(
            f"{folder} holds only pickled weights (.bin), which are never opened: convert a model that you trust with "
            "DiffusionPipeline.from_pretrained(...).save_pretrained(NEW_FOLDER) and name the new folder"
        )
    raise UserError(f"{folder} holds no *.safetensors weights; copy or download the model anew")


def load_tokenizer(folder: Path, kind: type) -> Any:
    """The tokenizer of class ``kind`` from its component folder."""
    try:
        return kind.from_pretrained(folder, local_files_only=True)  # type: ignore[attr-defined]
    except FAILURES as error:
        raise UserError(f"{folder} cannot be loaded: {first_line(error)}; copy or download it anew") from error


def load_scheduler(folder: Path) -> Any:
    """The checkpoint's own scheduler, of the class that model_index.json names."""
    name = (read_json(folder / INDEX).get("scheduler") or [None, ""])[1]
    if not hasattr(diffusers, str(name)):
        raise UserError(f"{folder / INDEX}: the scheduler '{name}' is not one that diffusers has")
    return getattr(diffusers, name).from_config(read_json(folder / "scheduler" / "scheduler_config.json"))


def export(
    source: Path,
    networks: dict[str, nn.Module],
    scheduler: Any,
    folder: Path,
    dtype: torch.dtype | None = None,
    grown: dict[str, Any] | None = None,
) -> None:
    """Write ``networks`` and all else that ``source`` has as a folder that DiffusionPipeline loads and draws with.

    Configs, tokenizer and safety checker are copies, and so is the scheduler unless it is another than the source's;
    tokenizers that have ``grown`` by a word are written over the source's.
    The folder appears whole or not at all.

    Raises:
        UserError: the folder cannot be written.
    """
    with atomic(folder) as partial:
        partial.mkdir(parents=True)
        index = read_json(source / INDEX)
        for name, entry in index.items():
            if not isinstance(entry, list) or entry == [None, None]:
                continue
            if not (source / name).is_dir():
                index[name] = [None, None]
                continue
            if name in networks:
                _write_network(source / name, networks[name], partial / name, dtype)
            elif name == "scheduler" and dict(scheduler.config) != dict(load_scheduler(source).config):
                scheduler.save_pretrained(partial / name)
                index[name] = ["diffusers", type(scheduler).__name__]
            else:
                _copy_component(source / name, partial / name)
            if name in (grown or {}):
                grown[name].save_pretrained(partial / name)  # type: ignore[index]
        write_json(partial / INDEX, index)


def published(network: nn.Module, weights: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A network's own weights, or others named after its parts, by their published names.

    Transformers 5 drops the ``text_model.`` of CLIP text encoders.
    """
    prefix = "text_model." if isinstance(network, CLIPTextModel) else ""
    weights = own_weights(network) if weights is None else weights
    return {name if name.startswith(prefix) else prefix + name: value for name, value in weights.items()}


def _write_network(source: Path, network: nn.Module, folder: Path, dtype: torch.dtype | None) -> None:
    folder.mkdir()
    config = read_json(source / "config.json")
    weights = {
        name: value.detach().to("cpu", dtype if value.is_floating_point() else None).contiguous()
        for name, value in published(network).items()
    }
    stem = "diffusion_pytorch_model" if "_class_name" in config else "model"
    save_file(weights, folder / f"{stem}.safetensors", {"format": "pt"})
    if "vocab_size" in config:  # which a new word raises
        config["vocab_size"] = network.config.vocab_size  # type: ignore[union-attr]
    write_json(folder / "config.json", _in_float32(config))


def _copy_component(source: Path, folder: Path) -> None:
    """Copy a component; weights that exist only as a variant take the plain name, by which they are looked for."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(".*"))
    variants = {match[1] for path in folder.iterdir() if (match := WEIGHTS.fullmatch(path.name))}
    if len(variants) == 1 and (variant := variants.pop()) is not None:
        for path in list(folder.iterdir()):
            path.rename(folder / path.name.replace(f".{variant}", ""))
        write_json(folder / "config.json", _in_float32(read_json(folder / "config.json")))


def _in_float32(config: dict[str, Any]) -> dict[str, Any]:
    """A transformers config that asks for float32, as diffusers loads its own; transformers 5 would keep the file's."""
    if "_class_name" in config:
        return config
    return {**{key: value for key, value in config.items() if key != "torch_dtype"}, "dtype": "float32"}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): name a diffusers model folder") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON object in the layout of diffusers' own files."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def first_line(error: BaseException) -> str:
    """What an error of a library says, as part of one line."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def root_cause(error: BaseException) -> str:
    """The first sentence of the error at the bottom of a chain."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return first_line(error).split(". ")[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Loading and saving without transformers' bars and its report of keys that it no longer needs."""
    level, bars = transformers.utils.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
