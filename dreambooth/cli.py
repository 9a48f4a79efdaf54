"""The command line: ``dreambooth``, ``python launch.py``, ``srun`` and ``torchrun launch.py`` all come here."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dreambooth import config
from dreambooth.errors import UserError
from dreambooth.nearest import nearest
from dreambooth.run_folder import is_rank_zero

TASKS: dict[str, str] = {
    "prepare": "dreambooth.tasks:prepare",
    "train": "dreambooth.tasks:train",
    "generate": "dreambooth.generate:generate",
    "pretrain": "dreambooth.pocket.pretrain:pretrain",
}


def main() -> None:
    """Run one command; exit code 2 and one line on stderr when what was typed cannot be done."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing and exiting 1
    config.register_resolvers()
    with _one_line(config.COMPOSITION_ERRORS):
        _refuse_dashes(sys.argv[1:])
        _run()


@hydra.main(version_base="1.3", config_path=str(config.CONF), config_name="config")
def _run(cfg: DictConfig) -> None:
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        with _one_line(()):  # here too: Hydra writes a line of its own about every exception but SystemExit
            settled = config.settle(cfg, HydraConfig.get(), str(folder))
            result = _task(str(cfg.task))(settled)
            if is_rank_zero() and hasattr(result, "folder"):
                print(result.folder, flush=True)  # the last line, for scripts
    finally:
        _remove_empty(folder)


def _refuse_dashes(arguments: list[str]) -> None:
    """``--learning_rate=5e-6`` is what other trainers take; argparse would answer with a page about Hydra's flags."""
    for argument in arguments:
        if re.match(r"--?(?!config-|cfg|package|info|experimental-)[a-z]\w*[=./]", argument):
            raise UserError(
                f"{argument}: settings have no dashes, type {argument.lstrip('-')}; --help names the usual ones"
            )


def _task(name: str) -> Callable[[DictConfig], Any]:
    if name not in TASKS:
        raise UserError(f"task={name}: there is no such task{nearest(name, TASKS)}")
    module, function = TASKS[name].split(":")
    return getattr(import_module(module), function)


@contextmanager
def _one_line(composing: tuple[type[Exception], ...]) -> Iterator[None]:
    """End the process with one line for a UserError, and for the errors met while ``composing``."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        known = config.user_error(error)
        line = str(known) if known else None
        if line is None and composing:
            line = _unwritable(error) or (config.explain(error) if isinstance(error, composing) else None)
        if line is None:
            raise
        print(f"dreambooth: {line}", file=sys.stderr)
        sys.exit(2)


def _unwritable(error: Exception) -> str | None:
    """Hydra makes the run folder before the task begins."""
    if not isinstance(error, OSError) or not error.filename:
        return None
    return f"cannot write the run folder {error.filename}: {error.strerror}; choose another with hydra.run.dir=DIR"


def _remove_empty(folder: Path) -> None:
    """Take back the run folder that Hydra made when nothing was written to it, and its parents up to here."""
    with suppress(OSError):
        folder.rmdir()
        for parent in folder.parents:
            if Path.cwd() not in parent.parents:
                break
            parent.rmdir()
