"""What there is to do: the tasks of ``task=``, and what the rest of the program has to know of each. Needs no torch."""

from typing import NamedTuple


class Task(NamedTuple):
    """One task: a function of the whole tree, as "module:function", imported when it runs.

    Attributes:
        required: keys below this one that have no value (``???``) must be given one.
        loads_base: whether ``model.from_pretrained`` must be there.
        distributed: whether Lightning starts processes, or finds those that SLURM started.
        has_scores: whether a sweep of it ends with a table.
        own_run: whether it has a run folder of its own; else that of the training by the same settings.
    """

    function: str
    required: str | None = None
    loads_base: bool = False
    distributed: bool = False
    has_scores: bool = False
    own_run: bool = False


TASKS = {
    "train": Task("dreambooth.tasks:train", required="model", loads_base=True, distributed=True, has_scores=True),
    "prepare": Task("dreambooth.tasks:prepare", required="model", loads_base=True, distributed=True),
    "generate": Task("dreambooth.generation:generate"),
    "evaluate": Task("dreambooth.evaluation:evaluate"),
    "export": Task("dreambooth.parallel.export:export"),
    "benchmark": Task(
        "dreambooth.benchmark.task:benchmark", required="benchmark", loads_base=True, has_scores=True, own_run=True
    ),
    "identifier": Task("dreambooth.identifier:identifier"),
    "report": Task("dreambooth.report.task:report"),
    "shard": Task("dreambooth.sharding:shard"),
    "pretrain": Task("dreambooth.pocket.pretrain:pretrain", own_run=True),
}


def task_of(name: object) -> Task:
    """The task of that name; of one that nobody has, something that asks for nothing (the command refuses it)."""
    return TASKS.get(str(name), Task(""))
