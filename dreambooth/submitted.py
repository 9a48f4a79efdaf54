"""Jobs that a launcher submitted and that died: the sweep waits for the others, and what is known of them is told."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.utils import JobReturn, JobStatus

OURS = "dreambooth: "  # how a line on stderr begins that says why a job ends


class Dead(NamedTuple):
    """A job that left no result: its number, its overrides, where its logs lie, why it ended, and its exit code."""

    number: int
    overrides: list[str]
    logs: Path
    error: str
    code: int


def outlast(tell: Callable[[Dead], None]) -> None:
    """Have the launcher take a job that died for one that has ended, after ``tell`` is told of it.

    Of itself it raises at the first of them: Hydra then ends no sweep, and nobody waits for the jobs that still run.
    """
    from submitit import Job
    from submitit.core.utils import UncompletedJobError

    kind: Any = Job
    original = getattr(kind.results, "__wrapped__", kind.results)

    @wraps(original)
    def results(job: Any) -> list[Any]:
        try:
            found: list[Any] = original(job)
        except UncompletedJobError:
            tell(_dead(job))
            ended = JobReturn(status=JobStatus.COMPLETED)
            ended.return_value = None
            return [ended]
        return found

    kind.results = results


def _dead(job: Any) -> Dead:
    """What is known of a job: the line its processes ended with if there is one, else the state that SLURM tells."""
    overrides, _, number, *_ = job.submission().args
    paths = job.paths
    # one file for all tasks, or one each: all begin with the job's number
    logs = sorted(paths.folder.glob(f"{job.job_id}_*_log.err"))
    lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()]
    said = [line.removeprefix(OURS) for line in lines if line.startswith(OURS)]
    state = str(job.state).split()[0] if job.state else "UNKNOWN"
    if said and state not in ("OUT_OF_MEMORY", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
        return Dead(number, list(overrides), paths.folder, said[-1], 2)
    return Dead(number, list(overrides), paths.folder, f"did not end ({state}); its logs lie in {paths.folder}", 1)
