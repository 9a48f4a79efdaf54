"""What SLURM says of this process, what does not fit it, and how a job comes back to the queue. Needs no torch."""

import logging
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dreambooth.errors import UserError
from dreambooth.run_folder import is_rank_zero
from dreambooth.run_id import slurm_job
from dreambooth.task_table import task_of

log = logging.getLogger(__name__)
# "Go on later": USR1 is what docs/slurm.md has sbatch send, USR2 what submitit does. TERM is not among them: scancel
# sends it, and a job that somebody cancelled is not to come back (a pre-empted one is: ``preempted``).
REQUEUE_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2) if hasattr(signal, "SIGUSR1") else ()
PATIENCE = 10.0  # seconds that a rank gives the first one to requeue the job, before it leaves and is missed
_asked: list[bool] = []  # whether this process has asked to be requeued
_early: list[int] = []  # signals that came before anything could answer them


def in_job() -> bool:
    """Whether this process belongs to a batch job; an interactive shell's commands begin and end with their user."""
    return slurm_job() is not None


def launched_by_srun() -> bool:
    """Whether SLURM has started all processes that there are to be, so that Lightning starts none."""
    return in_job() and "SLURM_NTASKS" in os.environ


def requeue() -> None:
    """Put this job back into the queue; call it on the first rank. SLURM ends all its processes thereupon."""
    if _asked:
        return
    _asked.append(True)
    scontrol = shutil.which("scontrol")
    job = str(slurm_job())
    if scontrol is None:
        log.warning("scontrol is not here, so job %s was not requeued: submit it again to go on", job)
        return
    done = subprocess.run([scontrol, "requeue", job], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = " ".join((done.stderr or done.stdout).split())
        log.warning("job %s was not requeued (%s): submit it again to go on", job, reason)
    else:
        log.info("requeued job %s", job)


def preempted() -> bool:
    """Whether SLURM is taking this job's place, and gives it time to end by itself: it would then count as failed.

    SLURM brings back by itself only what it had to kill (slurmctld's ``_job_complete``), and tells of the rest by TERM,
    as ``scancel`` does of a job that is to stay away.
    """
    scontrol = shutil.which("scontrol")
    if not in_job() or scontrol is None:
        return False
    shown = subprocess.run(
        [scontrol, "show", "job", "-o", str(slurm_job())], capture_output=True, text=True, check=False
    )
    fields = dict(part.partition("=")[::2] for part in shown.stdout.split())
    return fields.get("JobState") == "RUNNING" and fields.get("PreemptTime", "None") not in ("None", "N/A", "Unknown")


class Requeued(SystemExit):
    """The end of a process that is to go on later; the first rank has asked for it, or is to ask."""

    def __init__(self) -> None:
        super().__init__(143)


@contextmanager
def patient() -> Iterator[None]:
    """For the whole of a command in a job: a signal that means "go on later" never kills it between two places.

    One that comes before ``requeued`` waits for it. One that comes when all is done is not heard any more: the process
    would end as a failed one while Python clears up.
    """
    if not (in_job() and threading.current_thread() is threading.main_thread()):
        yield
        return
    _early.clear()
    for sign in REQUEUE_SIGNALS:
        signal.signal(sign, lambda sign, _: _early.append(sign))
    try:
        yield
    finally:
        for sign in REQUEUE_SIGNALS:
            signal.signal(sign, signal.SIG_IGN)


@contextmanager
def requeued(wanted: bool) -> Iterator[None]:
    """Within, a signal that means "go on later" requeues the job and ends this process with ``Requeued``, at once.

    TERM does so where the job is being pre-empted, and else ends the process as it always does, by SystemExit(143).

    That loses nothing wherever every file is whole at every moment, which is everywhere but between the steps of a
    training; there ``callbacks.preemption`` takes the signals over.
    """
    if not (wanted and in_job() and threading.current_thread() is threading.main_thread()):
        yield
        return

    def end(*_: object) -> None:
        if is_rank_zero():
            requeue()
        else:  # a rank that leaves may have srun end the first one before that has asked
            time.sleep(PATIENCE)
        raise Requeued

    def end_if_preempted(*_: object) -> None:
        if preempted():
            end()
        raise SystemExit(143)

    before: dict[int, Any] = {sign: signal.signal(sign, end) for sign in REQUEUE_SIGNALS}
    before[signal.SIGTERM] = signal.signal(signal.SIGTERM, end_if_preempted)
    try:
        if _early:
            end()
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)


def check(cfg: Any) -> None:
    """Raise UserError when the trainer wants other processes than SLURM started; Lightning would wait for the rest."""
    env = os.environ
    if not launched_by_srun() or "TORCHELASTIC_RUN_ID" in env or not task_of(cfg.task).distributed:
        return
    tasks, nodes = int(env["SLURM_NTASKS"]), env.get("SLURM_NNODES", "1")
    per_node = env.get("SLURM_NTASKS_PER_NODE")
    if tasks > 1 and "SLURM_STEP_ID" not in env:
        raise UserError(f"the job has {tasks} tasks and this process is none of them: type srun before the command")
    if tasks > 1 and per_node is None:
        raise UserError(f"the job was given --ntasks={tasks}: type sbatch --nodes and --ntasks-per-node instead")
    if int(nodes) != cfg.trainer.num_nodes:
        raise UserError(
            f"trainer.num_nodes={cfg.trainer.num_nodes}, but the job has {nodes} nodes: type "
            f"trainer.num_nodes={nodes}, or sbatch --nodes={cfg.trainer.num_nodes}"
        )
    devices, started = device_count(cfg.trainer.devices), int(per_node or 1)
    if devices is not None and devices != started:
        raise UserError(
            f"trainer.devices={cfg.trainer.devices}, but SLURM starts {started} tasks on each node: type "
            f"trainer.devices={started}, or sbatch --ntasks-per-node={devices}"
        )


def device_count(devices: Any) -> int | None:
    """How many devices ``trainer.devices`` means; None where that is the machine's to say."""
    if isinstance(devices, int) or (isinstance(devices, str) and devices.lstrip("-").isdigit()):
        return int(devices) if int(devices) >= 0 else None
    if isinstance(devices, str):
        return None if devices == "auto" else len([part for part in devices.split(",") if part.strip()])
    return len(devices)
