"""The command line: ``dreambooth``, ``python launch.py``, ``srun`` and ``torchrun launch.py`` all come here."""

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from dreambooth import config, flags, hub, slurm
from dreambooth.errors import UserError
from dreambooth.nearest import nearest
from dreambooth.run_folder import is_rank_zero
from dreambooth.sweep import Outcome, is_sweep, refuse, submission
from dreambooth.task_table import TASKS

# Hydra's flags that the next word belongs to.
VALUED = (
    "--cfg",
    "-c",
    "--package",
    "-p",
    "--config-path",
    "-cp",
    "--config-name",
    "-cn",
    "--config-dir",
    "-cd",
    "--info",
)


def main() -> None:
    """Run one command; exit code 2 and one line on stderr when what was typed cannot be done."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing and exiting 1
    config.register_resolvers()
    try:
        with slurm.patient():
            _refuse_others(sys.argv[1:])
            _run()
    except config.COMPOSITION_ERRORS as error:
        _fail(config.explain(error))
    except UserError as error:
        _fail(error)
    except BrokenPipeError:  # whoever read it has seen enough: dreambooth --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # Hydra makes the run folder before the task begins
        _fail(f"cannot write the run folder {error.filename}: {error.strerror}; choose another with hydra.run.dir=DIR")
    except KeyboardInterrupt:  # a launcher waits, or Hydra composes
        sys.exit(130)
    except Exception as error:
        if (refused := submission(error)) is None:
            raise
        _fail(refused)


@hydra.main(version_base="1.3", config_path=str(config.CONF), config_name="config")
def _run(cfg: DictConfig) -> Outcome:
    """The job of one composed tree. It ends the process itself: Hydra writes a line about every exception.

    A job of a sweep ends nothing: the others go on, and the sweep ends with its exit code.
    """
    node = HydraConfig.get()
    folder = Path(node.runtime.output_dir)
    try:
        outcome = _job(cfg, node, folder)
    finally:
        _remove_empty(folder)
    if outcome.error is not None and not (is_sweep(node) and (outcome.alike or is_rank_zero())):
        sys.exit(outcome.code)  # a rank that fails alone ends the others
    return outcome


def _job(cfg: DictConfig, node: Any, folder: Path) -> Outcome:
    alike = True
    try:
        settled = _settled(cfg, node, folder)
        refuse(settled, node)
        hub.check(settled)
        task, alike = _task(str(cfg.task)), False
        result = task(settled)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        known = config.user_error(error)
        if known is None:
            traceback.print_exc()
            return Outcome(None, f"{type(error).__name__}: {error}".splitlines()[0], 1, alike)
        print(f"dreambooth: {known}", file=sys.stderr)
        return Outcome(None, str(known), 2, alike)
    if not hasattr(result, "folder"):
        return Outcome(str(folder))
    if is_rank_zero():
        print(result.folder, flush=True)  # the last line, for scripts
    return Outcome(str(result.folder))


def _settled(cfg: DictConfig, node: Any, folder: Path) -> DictConfig:
    """The checked tree. Hydra composes before values are made of others, so that what fails of it fails here."""
    try:
        return config.settle(cfg, node, str(folder))
    except config.COMPOSITION_ERRORS as error:
        raise UserError(config.explain(error)) from error


def _fail(line: object) -> NoReturn:
    print(f"dreambooth: {line}", file=sys.stderr)
    sys.exit(2)


def _refuse_others(arguments: list[str]) -> None:
    """``--learning_rate=5e-6`` is what other trainers take; argparse would answer with a page about Hydra's flags."""
    for place, argument in enumerate(arguments):
        if flags.unknown(argument):
            tree: Any = OmegaConf.to_container(config.defaults(), resolve=True)
            raise flags.refusal(arguments, place, tree)
        if argument in TASKS and not (place and arguments[place - 1] in VALUED):
            raise UserError(f"cannot read '{argument}'; type task={argument}")


def _task(name: str) -> Callable[[DictConfig], Any]:
    if name not in TASKS:
        raise UserError(f"task={name}: there is no such task{nearest(name, TASKS)}")
    module, function = TASKS[name].function.split(":")
    return getattr(import_module(module), function)


def _remove_empty(folder: Path) -> None:
    """Take back the run folder that Hydra made when nothing was written to it, and its parents up to here."""
    with suppress(OSError):
        if folder == Path.cwd():
            return
        folder.rmdir()
        for parent in folder.parents:
            if Path.cwd() not in parent.parents:
                break
            parent.rmdir()
