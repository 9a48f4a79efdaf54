"""The run folder: whether a run is new, to be resumed or finished, and who trains in it.

Importable without torch, numpy and PIL.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import count, islice, takewhile
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from dreambooth.errors import UserError
from dreambooth.run_id import irrelevant, slurm_job

log = logging.getLogger(__name__)

GOALS = ("trainer.max_steps", "trainer.max_epochs")  # may be raised in a folder that exists; STOPS may be changed
STOPS = tuple(f"callbacks.evaluate.{name}" for name in ("patience", "max_drift", "max_forgetting", "target"))
# May differ in a folder that exists: how the ranks share the work. Its sum, the global batch, is in the checkpoints.
SHARING = (
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.strategy.*",
    "trainer.accumulate_grad_batches",
    "model.micro_batch_size",
    "model.gradient_checkpointing",
)
FOLDER_VARIABLE = (
    "DREAMBOOTH_RUN_FOLDER"  # tells Lightning's other processes what rank 0 decided, asked for which folder
)
CONFIG, OVERRIDES, SUMMARY = "config.yaml", "overrides.yaml", "summary.json"
JOB, LOCK = ".slurm_job", ".lock"  # which job began there, or went on with other settings; held while somebody trains
PATIENCE = 10.0  # seconds: the loader processes of a killed run hold its lock for a few more
MISSING = "(absent)"


@dataclass(frozen=True)
class Run:
    """A run folder; ``summary`` is that of the finished run, None while there is something to do."""

    folder: Path
    summary: dict[str, Any] | None = None


def is_rank_zero() -> bool:
    """Whether this process is the one that writes, asked before any process group exists (Lightning's variables)."""
    names = ["RANK"] if "RANK" in os.environ else ["LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"]
    return all(int(os.environ.get(name, 0)) == 0 for name in names)


def open_run(cfg: DictConfig, folder: Path) -> Run:
    """``find_run``, then ``begin``."""
    run = find_run(cfg, folder)
    if run.summary is None:
        begin(cfg, run)
    return run


def find_run(cfg: DictConfig, folder: Path) -> Run:
    """Take ``folder`` for the run of ``cfg``: new, to be gone on with, or finished. Writes nothing.

    The same settings go on, and so do a raised ``trainer.max_steps`` and other ``SHARING``; any others take a folder in
    which nothing was trained yet. With ``resume=false`` a folder that is taken is left alone and the next free one of
    ``folder-2, folder-3, …`` begins; a job that SLURM starts again goes on with the one that it began, if it did.
    Raises UserError when the folder belongs to other settings (naming them) or cannot be written.
    """
    asked, _, decided = os.environ.get(FOLDER_VARIABLE, "").partition("\n")
    if asked == str(folder) and not is_rank_zero():  # another one's is of a run before
        return Run(Path(decided))
    free = folder
    if not cfg.resume:
        taken = list(takewhile(_begun, numbered(folder)))
        restarted = int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0
        own = [each for each in taken if restarted and _job_of(each) == slurm_job()]
        free = own[-1] if own else next(islice(numbered(folder), len(taken), None))
    run = Run(free, _finished(cfg, free) if _begun(free) else None)
    if is_rank_zero():
        if run.summary is None:
            from dreambooth.data.checks import writable  # not above: the name of a run folder needs no torch

            writable(free, "hydra.run.dir")
        os.environ[FOLDER_VARIABLE] = f"{folder}\n{free}"
    return run


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Within, no other command trains in ``folder``; the first rank asks for all. UserError when one does already."""
    made = not folder.exists()
    lock = FileLock(folder / LOCK, fallback_to_soft=False)  # a mere file would outlive a kill
    if is_rank_zero():
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            raise UserError(
                f"{folder}: another process trains in this run folder (it holds {LOCK}); wait for it, or type "
                "hydra.run.dir=ANOTHER_FOLDER"
            ) from None
        except (OSError, NotImplementedError) as error:  # a file system without locks, or nothing can be written there
            log.debug("%s is not locked: %s", folder, error)
    try:
        yield
    finally:
        if lock.is_locked:  # still: who waits for it looks whether the file that it got is the one that lies there
            (folder / LOCK).unlink(missing_ok=True)
            lock.release()
            with suppress(OSError):
                if made:  # and an error came before anything was written
                    folder.rmdir()


def begin(cfg: DictConfig, run: Run) -> None:
    """Write the settings of a run that begins, or goes on with a raised goal or other ``SHARING``."""
    folder, settings = run.folder, OmegaConf.to_container(cfg, resolve=True)
    begun = _begun(folder)
    log.info("going on in run folder %s" if begun and _trained(folder) else "run folder %s", folder)
    if not is_rank_zero() or (begun and not _changes(_read_config(folder), settings)):
        return
    if begun and not _trained(folder):
        shutil.rmtree(folder / "samples", ignore_errors=True)  # of the base, drawn with settings that are no more
        (folder / "curves.csv").unlink(missing_ok=True)
    if begun:  # in this order a kill in between leaves the old goal without a summary: never a new goal called finished
        (folder / SUMMARY).unlink(missing_ok=True)
    _write_config(settings, folder)
    if (job := slurm_job()) is not None:
        (folder / JOB).write_text(job)


def _finished(cfg: DictConfig, folder: Path) -> dict[str, Any] | None:
    """The summary of the run of these settings, None while there is something to do; UserError: it is another's."""
    changed = _changes(_read_config(folder), OmegaConf.to_container(cfg, resolve=True))
    raised = {key for key in GOALS if key in changed and _is_raise(*changed[key])}
    shared = {key for key in changed if any(fnmatchcase(key, pattern) for pattern in SHARING)}
    loosened = changed.keys() & set(STOPS)
    refused = {key: values for key, values in changed.items() if key not in raised | shared | loosened}
    if refused and _trained(folder):
        shown = "; ".join(f"{key} {old} → {new}" for key, (old, new) in list(refused.items())[:6])
        more = f" and {len(refused) - 6} more" if len(refused) > 6 else ""
        raise UserError(
            f"{folder} holds a run with other settings ({shown}{more}): type the old values to go on with it, "
            "hydra.run.dir=ANOTHER_FOLDER, or resume=false to begin afresh beside it"
        )
    if not raised and not refused and (summary := summary_in(folder)) is not None:
        more = " ".join(f"{key}=null" for key in STOPS) if summary.get("stopped") else "a higher trainer.max_steps"
        if not summary.get("stopped") or all(changed[key][0] == MISSING for key in loosened):  # a run from before a key
            told = "%s is finished (%s steps): to train on, type hydra.run.dir=%s and %s; to begin afresh, resume=false"
            log.info(told, folder, summary["steps"], folder, more)
            return dict(summary)
    return None


def numbered(folder: Path) -> Iterator[Path]:
    """``folder``, ``folder-2``, ``folder-3``, and so on without end."""
    yield folder
    yield from (folder.with_name(f"{folder.name}-{number}") for number in count(2))


def _job_of(folder: Path) -> str | None:
    return (folder / JOB).read_text() if (folder / JOB).exists() else None


def _begun(folder: Path) -> bool:
    """Whether a run left anything beside its settings: one that ended in an error before training holds no folder."""
    others = (path.name for path in folder.glob("[!.]*") if path.name not in (CONFIG, OVERRIDES))
    return (folder / CONFIG).exists() and any(others)


def _trained(folder: Path) -> bool:
    """Whether a step was made there. What only prepared, or met an error on its way to the first step, holds none."""
    left = any(any(folder.glob(name)) for name in (SUMMARY, "checkpoints/*.ckpt", "pipeline", "adapter"))
    rows = folder / "metrics.csv"
    return left or (rows.exists() and len(rows.read_text().splitlines()) > 1)


def settings_in(folder: Path, remedy: str = "repair it, or name another run") -> Any:
    """The unresolved tree of the run in ``folder``; UserError, with the ``remedy``, when its config.yaml is damaged."""
    try:
        found: Any = OmegaConf.load(folder / CONFIG)
        whole = OmegaConf.is_dict(found) and OmegaConf.is_dict(found.get("model"))
        reason = "" if whole else "it does not hold the settings of a run"
    except Exception as error:
        reason = str(error).splitlines()[0]
    if reason:
        raise UserError(f"{folder / CONFIG} cannot be read ({reason}): {remedy}")
    return found


def summary_in(folder: Path) -> dict[str, Any] | None:
    """The summary.json of the run in ``folder``; None where there is none, or a damaged one, which is said."""
    path = folder / SUMMARY
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        found = None
    if not isinstance(found, dict) or "steps" not in found:
        log.warning("%s is damaged: it is written again when the run ends", path)
        return None
    return found


def _read_config(folder: Path) -> Any:
    return OmegaConf.to_container(settings_in(folder, "type resume=false to begin afresh"))


def _write_config(settings: Any, folder: Path) -> None:
    from dreambooth.files import atomic  # needs torch

    if not is_rank_zero():
        return
    try:
        with atomic(folder / CONFIG) as temporary:
            OmegaConf.save(OmegaConf.create(settings), temporary)
    except UserError as error:
        raise UserError(f"{error}: hydra.run.dir=DIR") from error


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists and empty mappings are values."""
    if isinstance(node, dict) and node:
        return {key: value for name, child in node.items() for key, value in flatten(child, f"{prefix}.{name}").items()}
    return {prefix[1:]: node}


def _changes(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Settings that differ and count, as key → (old, new)."""
    before, after = flatten(old), flatten(new)
    pairs = {key: (before.get(key, MISSING), after.get(key, MISSING)) for key in {**before, **after}}
    return {
        k: (a, b) for k, (a, b) in pairs.items() if a != b and not (irrelevant(f"{k}={a}") or irrelevant(f"{k}={b}"))
    }


def _is_raise(old: Any, new: Any) -> bool:
    return isinstance(old, int) and isinstance(new, int) and (new == -1 or new > old > -1)
