"""What a run is called: by its job, or by the settings that decide what comes of it.

Importable without torch, numpy and PIL: Hydra asks for the id before anything else is loaded.
"""

import hashlib
import os
import re
from fnmatch import fnmatchcase

from dreambooth.task_table import TASKS

# Settings (patterns on "key=value") that leave the trained weights and the pictures as they are: how the command is
# run, where copies are kept, what is shown meanwhile. `task` and `infer` are among them, so that `task=generate` added
# to a training command means the folder of that training. Devices and precision change the bits and are not.
IRRELEVANT = (
    *(f"task={name}" for name, task in TASKS.items() if not task.own_run),
    "identifier.*",
    "name=*",
    "resume=*",
    "hydra.*",
    "hydra/*",
    "run_dir=*",
    "infer.*",
    "infer=*",
    "evaluate.out_path=*",
    "evaluate.base_dir=*",
    "benchmark.base_dir=*",
    "benchmark.runs_dir=*",
    "report.*",
    "logger.*",
    "logger=*",
    "shard.*",
    "shard=*",
    "report=*",
    "callbacks.report*",
    "callbacks.checkpoint*",
    "callbacks.progress*",
    "callbacks.preemption*",
    "callbacks.sample_grid.batch_size=*",
    "callbacks/progress*",
    "model.data.num_workers=*",
    "model.data.cached_instance_dir=*",
    "model.data.cached_reg_dir=*",
    "trainer.enable_*",
    "trainer.log_every_n_steps=*",
)
RANDOM_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def run_id(override_dirname: str) -> str:
    """Name of the run: the SLURM job (``<array job>_<task>``), else torchrun's run id, else a hash of the overrides.

    torchrun without ``--rdzv-id`` makes up a UUID for each start; the same command would not find its folder by that.

    ``override_dirname`` is Hydra's ``key=value,key=value``; those in ``IRRELEVANT`` do not count.
    """
    if (job := slurm_job()) is not None:
        return job
    launched = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if launched != "none" and not RANDOM_ID.fullmatch(launched):
        return launched
    return settings_id(override_dirname)


def slurm_job() -> str | None:
    """The batch job of this process, ``<array>_<task>`` in an array; an interactive shell's many commands are none."""
    env = os.environ
    if not env.get("SLURM_JOB_ID") or env.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return None
    array = env.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{env.get('SLURM_ARRAY_TASK_ID', '0')}" if array else env["SLURM_JOB_ID"]


def settings_id(override_dirname: str) -> str:
    """A hash of the overrides that change the result: the name of a job of a sweep, of which a SLURM job may run many.

    It is the name that the same settings have without a sweep and without a launcher, so either goes on with the other.
    """
    overrides = re.split(r",(?=~|[+]*[A-Za-z_][\w./@]*=)", override_dirname)
    relevant = sorted({override for override in overrides if not irrelevant(override.lstrip("+~"))})
    return hashlib.blake2b("\n".join(relevant).encode(), digest_size=4).hexdigest()


def irrelevant(setting: str) -> bool:
    """Whether a ``key=value`` leaves the trained weights and the pictures as they are."""
    return any(fnmatchcase(setting, pattern) for pattern in IRRELEVANT)
