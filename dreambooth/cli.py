"""The command line: ``dreambooth``, ``python launch.py``, ``srun`` and ``torchrun launch.py`` all come here."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dreambooth import config
from dreambooth.errors import UserError

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
    try:
        _run()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        line = _line_for(error)
        if line is None:
            raise
        print(f"dreambooth: {line}", file=sys.stderr)
        sys.exit(2)


@hydra.main(version_base="1.3", config_path=str(config.CONF), config_name="config")
def _run(cfg: DictConfig) -> None:
    folder = HydraConfig.get().runtime.output_dir
    try:
        _task(str(cfg.task))(config.settle(cfg, HydraConfig.get(), folder))
    except Exception:
        _remove_empty(Path(folder))
        raise


def _task(name: str) -> Callable[[DictConfig], Any]:
    if name not in TASKS:
        raise UserError(f"task={name}: there is no such task{config.nearest(name, TASKS)}")
    module, function = TASKS[name].split(":")
    return getattr(import_module(module), function)


def _line_for(error: BaseException) -> str | None:
    """The one line that explains an error of the user's, None for every other error."""
    if (known := config.user_error(error)) is not None:
        return str(known)
    if isinstance(error, HydraException | OmegaConfBaseException | YAMLError):
        return config.explain(error)
    if isinstance(error, OSError) and error.filename and not HydraConfig.initialized():
        return f"cannot write the run folder {error.filename}: {error.strerror}; choose another with hydra.run.dir=DIR"
    return None


def _remove_empty(folder: Path) -> None:
    """Take back the run folder that Hydra made when nothing was written to it, and its parents up to here."""
    with suppress(OSError):
        folder.rmdir()
        for parent in folder.parents:
            if Path.cwd() not in parent.parents:
                break
            parent.rmdir()
