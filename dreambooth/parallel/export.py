"""task=export: what the newest checkpoint of a run holds, as the run itself would export it, on one CPU."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from dreambooth.callbacks.checkpoint import FOLDER, newest
from dreambooth.callbacks.export import ADAPTER, PIPELINE
from dreambooth.config import build
from dreambooth.errors import UserError
from dreambooth.parallel.checkpoint import Resume
from dreambooth.run_folder import CONFIG, is_rank_zero, settings_in
from dreambooth.tasks import make_module, quieten

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    """Where ``pipeline/`` or ``adapter/`` lies now."""

    folder: Path


def export(cfg: DictConfig) -> Exported | None:
    """Write ``pipeline/`` or ``adapter/`` of the run that ``infer.model`` names, however its ranks shared the weights.

    The run is not touched otherwise, and its command goes on with it as before. Other ranks do nothing.

    Raises UserError for a folder that is no run, a run without a checkpoint, and one that is finished.
    """
    quieten()
    if not is_rank_zero():
        return None
    run = Path(str(cfg.infer.model)).expanduser()
    if not (run / CONFIG).exists():
        raise UserError(f"infer.model={run}: there is no run in it; name a run folder, such as outputs/dreambooth/ID")
    if (run / "summary.json").exists():
        raise UserError(f"{run} is finished: what it exported is there already")
    own = settings_in(run)
    module = make_module(own, build(own.model.tuning)(build(own.model.family)))
    kept = newest(run / FOLDER, module.base)
    if kept is None:
        raise UserError(f"{run} has no checkpoint yet: let it train until callbacks.checkpoint.every_n_train_steps")
    nodes: tuple[Any, ...] = (
        own.callbacks.get("ema"),
        own.callbacks.get("export") or {"_target_": "dreambooth.callbacks.export.Export"},
    )
    callbacks = [*(build(node) for node in nodes if node is not None), Resume(kept)]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=int(kept.stem[5:]),  # nothing is left to train
        callbacks=callbacks,
        default_root_dir=run,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([0], batch_size=None))  # type: ignore[arg-type]
    written = [name for name in (PIPELINE, ADAPTER) if (run / name).exists()]
    log.info("step %d of %s is in %s", int(kept.stem[5:]), run, " and ".join(f"{name}/" for name in written))
    return Exported(run)
