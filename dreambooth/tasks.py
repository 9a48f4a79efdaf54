"""The tasks that train: from a config to its effect."""

import json
import logging
import math
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from dreambooth import slurm
from dreambooth.callbacks.checkpoint import FOLDER, Checkpoint, newest
from dreambooth.config import build
from dreambooth.data import checks
from dreambooth.data.datamodule import DreamBoothDataModule
from dreambooth.devices import keep_freed_memory
from dreambooth.errors import UserError, about
from dreambooth.module import DreamBoothModule
from dreambooth.parallel.checkpoint import Resume, same_batch
from dreambooth.parallel.checks import check
from dreambooth.report.overrides import record
from dreambooth.run_folder import Run, begin, claimed, find_run, is_rank_zero
from dreambooth.tuning.base import Tuning

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """Where a run lies and its summary.json."""

    folder: Path
    summary: dict[str, Any]


def train(cfg: DictConfig) -> RunResult:
    """Teach the model the subject: prepare, train (going on where a killed run stopped), export.

    A finished run is left alone. Raises UserError for what cannot work, before anything expensive or written, and
    SystemExit when interrupted (130) or terminated (143).
    """
    quieten()
    check(cfg)
    with slurm.requeued(requeues(cfg)):
        return _train(cfg)


def _train(cfg: DictConfig) -> RunResult:
    counts_epochs(cfg)
    run = find_run(cfg, Path(cfg.run_dir))
    if run.summary is not None:  # whatever became of its photos or its base since
        return RunResult(run.folder, run.summary)
    for node in cfg.logger.values():
        build(node)  # a package that is missing is said before anything is loaded or written
    tuning, data = prepare_data(cfg)
    if (grid := cfg.callbacks.get("sample_grid")) is not None and "resolution" in grid:
        checks.resolution(grid.resolution, tuning.family.vae_scale_factor, "callbacks.sample_grid.resolution")
    module = make_module(cfg, tuning)
    callbacks = make_callbacks(cfg)
    with claimed(run.folder):
        _fit(cfg, run, module, data, callbacks)
    path = run.folder / "summary.json"
    return RunResult(run.folder, json.loads(path.read_text()) if path.exists() else {})


def _fit(
    cfg: DictConfig, run: Run, module: DreamBoothModule, data: DreamBoothDataModule, callbacks: list[pl.Callback]
) -> None:
    """Train to the goal, from the newest checkpoint if there is one."""
    by_epochs = counts_epochs(cfg)
    if (kept := newest(run.folder / FOLDER, module.base)) is not None:
        callbacks.append(Resume(kept))
    trainer = make_trainer(cfg, run.folder, callbacks, max_steps=-1 if by_epochs else cfg.trainer.max_steps)
    if kept is not None:
        same_batch(kept, cfg.model.micro_batch_size * trainer.world_size * trainer.accumulate_grad_batches)
    begin(cfg, run)  # what the checkpoint refuses is refused by now: a finished run stays finished
    if is_rank_zero():
        record(cfg, run.folder)
    factors = cfg.model.micro_batch_size, trainer.world_size, trainer.accumulate_grad_batches
    log.info(
        "a step sees %d photos%s: model.micro_batch_size=%d x %d ranks x trainer.accumulate_grad_batches=%d; "
        "model.optim.lr is taken as it is, whatever their number",
        *(math.prod(factors), " and as many of the class" if data.paired else "", *factors),
    )
    if by_epochs:  # an epoch's last batch counts only when it is full, as MindONE drops it
        trainer.fit_loop.epoch_loop.max_steps = cfg.trainer.max_epochs * max(1, data.epoch_size // math.prod(factors))
    fit(trainer, module, data, cfg.resume)
    trainer.strategy.barrier()  # the first rank writes the summary


def prepare(cfg: DictConfig) -> Path:
    """Draw the missing regularization pictures and encode what is not cached; returns the folder of the former."""
    quieten()
    check(cfg)
    with slurm.requeued(requeues(cfg)):
        tuning, data = prepare_data(cfg)
        fit(make_trainer(cfg, Path(cfg.run_dir), [], max_steps=0), make_module(cfg, tuning), data)
    return Path(cfg.model.data.regularization_dir)


def prepare_data(cfg: DictConfig) -> tuple[Tuning, DreamBoothDataModule]:
    """What will learn of the untouched networks, and the checked data; nothing is drawn, encoded or written yet."""
    model = cfg.model
    checks.photos(model.data)  # a moment, beside the loading of a model
    with about("model.from_pretrained"):
        family = build(model.family)
    tuning: Tuning = build(model.tuning)(family)
    shared = "micro_batch_size restore_from_path use_cached_latents with_prior_preservation prior".split()
    given = {key: model[key] for key in shared} | {"train_text_encoder": tuning.learns_text, "seed": cfg.seed}
    data = build(model.data)(family, **given)
    data.check()
    if model.with_prior_preservation and not tuning.can_change_class:
        log.warning("nothing but a new word learns, so the class cannot drift: model.with_prior_preservation=false")
    return tuning, data


def make_module(cfg: DictConfig, tuning: Tuning) -> DreamBoothModule:
    """The training step of these settings, around what ``tuning`` lets learn."""
    model, family = cfg.model, tuning.family
    return DreamBoothModule(
        family,
        tuning,
        build(model.objective)(family.scheduler, build(model.loss)),
        build(model.weighting),
        build(model.optim),
        dict(model.sched),
        prior_loss_weight=model.prior_loss_weight,
        noise_offset=model.noise_offset,
        gradient_checkpointing=model.gradient_checkpointing,
        seed=cfg.seed,
        teacher=model.with_prior_preservation and model.prior == "teacher",
    )


def make_callbacks(cfg: DictConfig) -> list[pl.Callback]:
    """The callbacks of the tree in its order; one whose card is ``_partial_`` is given the whole tree."""
    made = [build(node) for node in cfg.callbacks.values() if node is not None]
    return [callback(cfg) if isinstance(callback, partial) else callback for callback in made]


def requeues(cfg: DictConfig) -> bool:
    """Whether a SLURM job that is told to go on later puts itself back into the queue."""
    return bool(OmegaConf.select(cfg, "callbacks.preemption.requeue"))


def make_trainer(cfg: DictConfig, folder: Path, callbacks: list[pl.Callback], max_steps: int) -> pl.Trainer:
    """Lightning's Trainer, counting optimizer steps: the stream of pictures has no epochs of its own."""
    # Lightning's own requeueing saves inside the signal handler, anywhere in a step, where no resume looks for it.
    by_srun = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    under_slurm = {"plugins": [SLURMEnvironment(auto_requeue=False)]} if by_srun else {}
    return build(
        cfg.trainer,
        max_steps=max_steps,
        max_epochs=-1,
        default_root_dir=str(folder),
        logger=[build(node)(save_dir=str(folder)) for node in cfg.logger.values()] if callbacks else False,
        callbacks=callbacks,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
        **under_slurm,
    )


def counts_epochs(cfg: DictConfig) -> bool:
    """Whether ``trainer.max_epochs`` decides the length (an epoch: every photo ``train_data_repeats`` times)."""
    steps, epochs = cfg.trainer.max_steps, cfg.trainer.max_epochs
    if (steps in (None, -1)) == (epochs in (None, -1)):
        raise UserError(
            f"trainer.max_steps={steps} and trainer.max_epochs={epochs}: one of them decides the length; "
            "type trainer.max_steps=-1 to count epochs, trainer.max_epochs=null to count steps"
        )
    return epochs not in (None, -1)


def fit(trainer: pl.Trainer, module: DreamBoothModule, data: DreamBoothDataModule, same_again: bool = True) -> None:
    """``trainer.fit``, where Ctrl-C and SIGTERM say in one line where the run stands and end with their usual codes.

    ``same_again`` is whether the same command goes on: with ``resume=false`` it would begin afresh.
    """
    keep_freed_memory(trainer.strategy.root_device)
    with ended_by_sigterm(trainer):
        try:
            trainer.fit(module, datamodule=data)
        except SystemExit as end:
            folder = Path(trainer.default_root_dir)
            kept = newest(folder / FOLDER, module.base)
            place = f"step {int(kept.stem[5:])}" if kept else "the beginning"
            step, goal = trainer.global_step, trainer.max_steps
            again = "the same command goes on" if same_again else f"hydra.run.dir={folder} without resume=false goes on"
            log.warning("stopped at step %d of %d in %s: %s from %s", step, goal, folder, again, place)
            raise SystemExit(143 if end.code == 143 else 130) from None


@contextmanager
def ended_by_sigterm(trainer: pl.Trainer) -> Iterator[None]:
    """Within, SIGTERM ends this process and the ranks that it launched with SystemExit(143), as Ctrl-C does with 130.

    Lightning's own handler does not act before the first step, and with several ranks it waits inside the handler for
    the others, for ever if they are in another collective; so it is replaced again once training starts.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        if (launcher := trainer.strategy.launcher) is not None:
            launcher.kill(signal.SIGTERM)
        if callable(before):  # a job that is pre-empted comes back
            before(signal.SIGTERM, None)
        raise SystemExit(143)

    def install(*_: object) -> None:
        signal.signal(signal.SIGTERM, end)

    before = signal.getsignal(signal.SIGTERM)
    install()
    trainer.callbacks.insert(0, pl.callbacks.LambdaCallback(on_train_start=install))  # type: ignore[attr-defined]
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def quieten() -> None:
    """Keep what the libraries say to their own developers off the screen, and what the first rank says already."""
    if not is_rank_zero():
        logging.getLogger("dreambooth").setLevel(logging.ERROR)
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # All but this: which rank died, before Lightning ends the others.
    logging.getLogger("lightning_fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    # On a login node, where it helps nobody; a job that lacks srun is refused by slurm.check.
    warnings.filterwarnings("ignore", "The `srun` command is available on your system but is not used")
    # Cached latents need no loader processes; and Lightning 2.6 asks torch 2.9 and later in a way that torch dislikes.
    warnings.filterwarnings("ignore", ".*does not have many workers which may be a bottleneck.*")
    # Where the first step of fp16 overflows, as GradScaler finds its scale by that, there is no update before it.
    warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before")
    # DeepSpeed clips by itself, and Lightning warns of the hook that it never needs.
    warnings.filterwarnings("ignore", ".*Since DeepSpeed handles gradient clipping internally.*")
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\).*", FutureWarning)
