"""task=benchmark: train and measure every subject of a protocol, shared out over processes, resumable by subject."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from dreambooth.benchmark import results, shared
from dreambooth.benchmark.protocol import Task, tasks_of
from dreambooth.config import same_command
from dreambooth.devices import devices_of
from dreambooth.errors import UserError
from dreambooth.metrics.method import ways
from dreambooth.run_folder import FOLDER_VARIABLE
from dreambooth.tasks import train

log = logging.getLogger(__name__)
# What a launcher tells its processes: each one trains subjects of its own, so Lightning is not to see a group.
GROUP = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NODE_RANK",
    "TORCHELASTIC_RUN_ID",
)
SLURM = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_NAME")
DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Benchmark:
    """Where the subjects' run folders and the tables lie, and the rows of the tables."""

    folder: Path
    rows: list[dict[str, Any]]


def benchmark(cfg: DictConfig) -> Benchmark:
    """Train and measure each subject in ``<run folder>/<subject>``, then write benchmark.{csv,json,md} there.

    What was measured on the way goes into curves.{csv,md}.

    The subjects are dealt out over ranks (torchrun, srun) and SLURM array tasks that share a run folder
    (``hydra.run.dir=DIR``). The same command goes on where a killed one stopped; a finished subject whose scores cannot
    be read is measured again, alone. Every process writes the tables of what is finished so far.

    Raises UserError for a protocol without subjects or prompts, an evaluation that is switched off, several devices for
    a subject, or ``resume=false``.
    """
    refuse_groups(cfg.trainer)
    if cfg.callbacks.get("evaluate") is None:
        raise UserError("callbacks.evaluate is null: task=benchmark measures; type callbacks/evaluate=default")
    if cfg.callbacks.get("summary") is None:
        raise UserError("callbacks.summary is null: task=benchmark reads what it writes; leave it out")
    if not cfg.resume:
        raise UserError(
            "resume=false: a benchmark goes on subject by subject; to begin afresh type hydra.run.dir=ANOTHER_FOLDER"
            + ("" if cfg.benchmark.runs_dir is None else " and benchmark.runs_dir=null")
        )
    tasks, folder = tasks_of(cfg.benchmark), Path(cfg.run_dir)
    shard, count = share()
    mine = tasks[shard::count]
    with alone():
        for number, task in enumerate(mine, 1):
            log.info("%s (%d of %d here, %d in all)", task.name, number, len(mine), len(tasks))
            run_subject(cfg, task, folder / task.name)
    return write_tables(folder, tasks)


def write_tables(folder: Path, tasks: list[Task]) -> Benchmark:
    """Write the tables of the subjects that are finished so far, whichever process trained them."""
    folders = {task.name: folder / task.name for task in tasks}
    rows: list[dict[str, Any]] = []
    while len(rows) < len(now := results.table(folders)):  # again if another process finished one meanwhile
        rows, text = now, results.write(folder, now, ways(filter(None, map(results.measured, folders.values()))))
    on_the_way = results.write_curves(folder, results.curves(folders))
    done = len(rows) - 3
    log.info("%d of %d subjects\n%s\n%s", done, len(tasks), text, on_the_way)
    if done < len(tasks):
        log.info("others are at work on the rest; typed again when they have ended, the same command tells of all")
    return Benchmark(folder, rows)


def run_subject(cfg: DictConfig, task: Task, place: Path) -> None:
    """Train and measure a subject in ``place``, or where ``benchmark.runs_dir`` keeps what others would train alike."""
    if cfg.benchmark.runs_dir is None:
        _train(cfg, task, place)
    else:
        key = shared.settings_key(tree_of(cfg, task, Path("run")))
        run = Path(cfg.benchmark.runs_dir).expanduser() / f"{task.name}-{key}"
        shared.link(place, run)
        with shared.claimed(run):
            _train(cfg, task, run)


def _train(cfg: DictConfig, task: Task, place: Path) -> None:
    repair(place)
    task.choose_photos(cfg.benchmark.num_photos, place)
    os.environ.pop(FOLDER_VARIABLE, None)  # each subject decides on a folder of its own
    train(tree_of(cfg, task, place))


def tree_of(cfg: DictConfig, task: Task, place: Path) -> DictConfig:
    """The settings of a subject's training in ``place``, the same from whichever benchmark."""
    tree: Any = OmegaConf.merge(cfg, task.settings(cfg.benchmark.identifier, cfg.benchmark, place), {"benchmark": None})
    OmegaConf.set_readonly(tree, True)
    return same_command(tree, cfg)


def refuse_groups(trainer: Any) -> None:
    """Raise UserError for a trainer of several processes: each would take itself for the first and start others."""
    nodes = trainer.num_nodes
    if devices_of(trainer) > 1 or nodes > 1:
        raise UserError(
            f"trainer.devices={trainer.devices} trainer.num_nodes={nodes}: task=benchmark trains each subject in one "
            "process; type trainer.devices=1 trainer.num_nodes=1, and to share out the subjects put srun, torchrun "
            "--nproc-per-node or sbatch --array in front, with one hydra.run.dir"
        )


def share() -> tuple[int, int]:
    """Which of how many equal shares this process has: ranks of a launcher, times the tasks of a SLURM array.

    The array in which submitit hands over a sweep is none of these: each of its tasks has settings of its own.
    """
    env = os.environ
    by_srun = "SLURM_STEP_ID" in env  # without srun the tasks of a job are only announced
    rank, world = (
        int(env.get(a, env.get(b, c) if by_srun else c))
        for a, b, c in (("RANK", "SLURM_PROCID", "0"), ("WORLD_SIZE", "SLURM_NTASKS", "1"))
    )
    if "SUBMITIT_EXECUTOR" in env:
        return rank, world
    first, step = int(env.get("SLURM_ARRAY_TASK_MIN", 0)), int(env.get("SLURM_ARRAY_TASK_STEP", 1))
    count = int(env.get("SLURM_ARRAY_TASK_COUNT", 1))
    if int(env.get("SLURM_ARRAY_TASK_MAX", first + (count - 1) * step)) != first + (count - 1) * step:
        raise UserError(
            "sbatch --array has gaps, so subjects would be left out: type all of it again, finished subjects are kept"
        )
    place = (int(env.get("SLURM_ARRAY_TASK_ID", first)) - first) // step
    return place * world + rank, count * world


@contextmanager
def alone() -> Iterator[None]:
    """Within, this process knows of no others, and of one GPU; the next job of a sweep knows its share again."""
    before = {name: os.environ.get(name) for name in (*GROUP, *SLURM, DEVICES, FOLDER_VARIABLE)}
    take_one_gpu()
    for name in (*GROUP, *SLURM):
        os.environ.pop(name, None)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def take_one_gpu() -> None:
    """Let this process see the GPU of its own number among those of its node, before anybody counts them."""
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    named = os.environ.get(DEVICES)
    seen = named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
    if local is not None and len(seen) > 1:
        os.environ[DEVICES] = seen[int(local) % len(seen)]


def repair(folder: Path) -> None:
    """Let a finished subject whose scores cannot be read be measured again: without a summary it is not finished."""
    if (folder / "summary.json").exists() and results.measured(folder) is None:
        log.warning("%s has no readable scores: it is measured again", folder)
        (folder / "summary.json").unlink()
        (folder / "evaluation" / "scores.jsonl").unlink(missing_ok=True)
