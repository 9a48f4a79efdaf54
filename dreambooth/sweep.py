"""The end of a sweep (``-m``): one table of what differs between its jobs and what came of each.

Importable without torch: Hydra makes the callback before anything else is loaded.
"""

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from dreambooth import hub
from dreambooth.config import COMPOSITION_ERRORS
from dreambooth.errors import UserError
from dreambooth.run_folder import is_rank_zero
from dreambooth.slurm import device_count, launched_by_srun
from dreambooth.submitted import Dead, outlast
from dreambooth.task_table import task_of

log = logging.getLogger(__name__)
RECORDS = ".sweep"  # in the sweep's folder while it lasts: a file for each job, whichever machine it ran on
NO_END = "did not end"  # the error of a job while it runs
# What decides whether a job can start; of what else is swept, one value stands for all.
DECISIVE = (
    "task experiment model model.from_pretrained model.revision trainer trainer.devices trainer.num_nodes".split()
)
ALLOTTED = {"num_nodes": "nodes", "devices": "tasks_per_node"}  # the launcher's words for keys of the trainer


class Outcome(NamedTuple):
    """What became of a job: its run folder, or the line that says why there is none, and its exit code.

    ``alike`` is whether every rank comes to the same error by itself, so that none waits for another.
    """

    folder: str | None
    error: str | None = None
    code: int = 0
    alike: bool = False


class SweepTable(Callback):
    """Writes sweep.md, sweep.csv and comparison.html into ``hydra.sweep.dir`` when all jobs of a sweep have ended.

    A job that failed is a row that says why; the command then ends with that job's exit code. The jobs may have run in
    this process or, by a launcher that waits for them, elsewhere on the same file system.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            _check(config)
        except UserError as error:
            print(f"dreambooth: {error}", file=sys.stderr)
            sys.exit(2)
        # Where a cluster keeps no accounts, it says so at every look, three times.
        logging.getLogger("submitit").setLevel(logging.ERROR)
        if is_rank_zero():
            shutil.rmtree(Path(config.hydra.sweep.dir) / RECORDS, ignore_errors=True)
        if submits(config.hydra):
            outlast(partial(_bury, Path(config.hydra.sweep.dir).absolute() / RECORDS, str(config.task)))

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if is_sweep(config.hydra):
            _record(config, Outcome(config.hydra.runtime.output_dir, NO_END))

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        if is_sweep(config.hydra) and job_return.status == JobStatus.COMPLETED:
            _record(config, job_return.return_value)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if not is_rank_zero():
            return
        folder = Path(config.hydra.sweep.dir).absolute()
        records = [json.loads(path.read_text()) for path in sorted((folder / RECORDS).glob("*.json"))]
        shutil.rmtree(folder / RECORDS, ignore_errors=True)
        failed = [record for record in records if record["error"]]
        try:
            if records and all(task_of(record["task"]).has_scores for record in records):
                from dreambooth.report.sweep import finish  # needs torch

                finish(folder, records)
        except Exception as error:  # Hydra would make a warning of it
            known = isinstance(error, UserError)
            print(f"dreambooth: {error}" if known else traceback.format_exc(), file=sys.stderr)
            sys.exit(2 if known else 1)
        if failed:
            print(f"dreambooth: {len(failed)} of {len(records)} jobs of the sweep failed", file=sys.stderr)
            sys.exit(max(record["code"] or 1 for record in failed))


def _check(config: DictConfig) -> None:
    """Raise UserError before any job is submitted for what some would wait for their turn to say."""
    submitted, absent = submits(config.hydra), set()
    for job in jobs(config):
        refuse(job, config.hydra)
        if submitted:
            allotted(job, config.hydra)
        hub.check(job)
        if submitted and (command := hub.download(job)):
            absent.add(command)
    if submitted and shutil.which("srun") is None:
        raise UserError("hydra/launcher=slurm: there is no srun here; type it on a login node of the cluster")
    if absent:
        line = "the hub's cache here lacks what the jobs load, and compute nodes seldom have a network: type %s first"
        log.warning(line, " and ".join(sorted(absent)))


def jobs(config: DictConfig) -> Iterator[Any]:
    """The trees of a sweep's jobs, one for each combination of what decides whether they can start.

    Where one cannot be composed, that is left for Hydra to say.
    """
    parsed = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
    choices: list[list[str]] = []
    for each in parsed:
        if not each.is_sweep_override():
            choices.append([str(each.input_line)])
        elif each.is_discrete_sweep():
            key = each.get_key_element()
            values = [f"{key}={value}" for value in each.sweep_string_iterator()]
            choices.append(values if key in DECISIVE else values[:1])
        else:
            return
    for combination in product(*choices):
        try:
            yield compose("config", overrides=list(combination))
        except COMPOSITION_ERRORS:
            return


def is_sweep(hydra_node: Any) -> bool:
    """Whether a job is one of a sweep."""
    return bool(hydra_node.mode == RunMode.MULTIRUN)


def submits(hydra_node: Any) -> bool:
    """Whether the launcher hands jobs to SLURM."""
    return str(hydra_node.launcher._target_).endswith("SlurmLauncher")


def refuse(cfg: Any, hydra_node: Any) -> None:
    """Raise UserError for a launcher that would not be asked, and for processes that Lightning would start in a sweep.

    It starts them with the command that was typed, so each would begin the whole sweep anew and wait for the others.
    """
    sweep, submitted = is_sweep(hydra_node), submits(hydra_node)
    if submitted and not sweep:
        typed = shlex.join(["dreambooth", "-m", *sys.argv[1:]])
        raise UserError(f"without -m Hydra asks no launcher and trains on this machine: type {typed}")
    launched = (
        submitted or launched_by_srun() or any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "LOCAL_RANK"))
    )
    if sweep and not launched and task_of(cfg.task).distributed and device_count(cfg.trainer.devices) != 1:
        raise UserError(
            f"trainer.devices={cfg.trainer.devices} in a sweep: its processes would each begin the sweep anew; type "
            "hydra/launcher=slurm, or put torchrun --nproc-per-node in front of launch.py"
        )


def allotted(cfg: Any, hydra_node: Any) -> None:
    """Raise UserError for a job that wants other processes than the launcher asks SLURM for; it would queue to say so.

    All jobs are submitted with the same numbers: those of the tree in which nothing is swept.
    """
    for key, word in ALLOTTED.items() if task_of(cfg.task).distributed else ():
        wanted, given = device_count(cfg.trainer[key]), _given(hydra_node, word)
        if given is None:
            raise UserError(
                f"trainer.{key}={cfg.trainer[key]}: SLURM is asked for a number; type hydra.launcher.{word}=NUMBER, too"
            )
        if wanted in (None, given):
            continue
        if any(typed.lstrip("+").startswith(f"hydra.launcher.{word}=") for typed in hydra_node.overrides.hydra):
            raise UserError(
                f"trainer.{key}={wanted}, but hydra.launcher.{word}={given}: type trainer.{key}={given}, or leave "
                f"hydra.launcher.{word} out"
            )
        raise UserError(
            f"trainer.{key}={wanted} in a sweep whose jobs are all submitted with {given}: type one sweep for each "
            f"number, as in -m trainer.{key}={wanted}"
        )


def _given(hydra_node: Any, word: str) -> int | None:
    """The number that the launcher asks SLURM for; None for -1, auto and a list, which the card hands on."""
    try:
        return device_count(hydra_node.launcher[word])
    except OmegaConfBaseException:
        return None


def submission(error: BaseException) -> UserError | None:
    """What sbatch said when it took no jobs, as one line; None for any other error."""
    cause = error.__cause__
    if not isinstance(cause, subprocess.CalledProcessError) or Path(str(cause.cmd[0])).name != "sbatch":
        return None
    said = " ".join(str(cause.stderr or cause.output).split())
    return UserError(f"hydra/launcher=slurm: {said or 'sbatch failed'}; see hydra.launcher.partition, account and qos")


def _record(config: DictConfig, outcome: Outcome) -> None:
    """Keep what is known of a job for the end of the sweep, on its first rank."""
    if not is_rank_zero():
        return
    content = {
        "task": str(config.task),
        "overrides": list(config.hydra.overrides.task),
        "folder": outcome.folder or config.hydra.runtime.output_dir,
        "error": outcome.error,
        "code": outcome.code,
    }
    _write(Path(config.hydra.sweep.dir).absolute() / RECORDS, int(config.hydra.job.num), content)


def _bury(folder: Path, task: str, dead: Dead) -> None:
    """Say that a submitted job died and make it a record, unless its first rank has said by itself how it ended."""
    path = folder / f"{dead.number:06d}.json"
    found = {"task": task, "overrides": dead.overrides, "folder": str(dead.logs), "error": NO_END}
    if path.exists():
        found = json.loads(path.read_text())
    if found["error"] == NO_END:
        print(f"dreambooth: job {dead.number} of the sweep: {dead.error}", file=sys.stderr)
        _write(folder, dead.number, found | {"error": dead.error, "code": dead.code})


def _write(folder: Path, number: int, content: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{number:06d}.tmp"
    temporary.write_text(json.dumps(content))
    temporary.rename(folder / f"{number:06d}.json")
