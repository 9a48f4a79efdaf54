"""A training on latents made up in code: what module and callbacks are tested with, without pictures or a VAE."""

from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from dreambooth import compose, train
from dreambooth.callbacks.checkpoint import Checkpoint
from dreambooth.data.pairs import Bucket, Role, Stream
from dreambooth.families.sd import StableDiffusion
from dreambooth.module import DreamBoothModule
from dreambooth.objective import Diffusion
from dreambooth.parallel.checkpoint import Resume
from dreambooth.parallel.tensors import read
from dreambooth.tasks import quieten
from dreambooth.tuning.full import Full

CONSTANT = {"name": "constant", "warmup_steps": 0, "num_cycles": 1, "power": 1.0}
PROMPTS = {"instance": "a photo of sks dog", "regularization": "a photo of dog"}


class Latents(pl.LightningDataModule):
    """The project's stream over random moments: 5 of the instance and, with the prior, 7 of its class.

    Over the pictures of a folder, of both roles, and encoded in every step, where ``photos`` are given.
    """

    def __init__(
        self,
        family: StableDiffusion,
        size: int,
        seed: int,
        prior: bool,
        text: bool,
        poison: str = "",
        photos: Path | None = None,
    ) -> None:
        super().__init__()
        self.family, self.micro_batch_size, self.seed, self.text, self.photos = family, size, seed, text, photos
        g = torch.Generator().manual_seed(7)
        self.moments = {"instance": torch.randn(5, 8, 8, 8, generator=g)}
        if prior:
            self.moments["regularization"] = torch.randn(7, 8, 8, 8, generator=g)
        for role, moments in self.moments.items():
            for number in range(len(moments)):
                if f"{role}/{number}" == poison:
                    moments[number] = float("nan")

    def train_dataloader(self) -> DataLoader:
        stream = self.stream(
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
            accumulate=self.trainer.accumulate_grad_batches,
            first_step=self.trainer.global_step,
        )
        return DataLoader(stream, batch_size=None)

    def stream(self, **place: int) -> Stream:
        """The micro-batches of one rank."""
        roles = []
        for name, moments in self.moments.items():
            paths = [Path(name, str(number)) for number in range(len(moments))]
            paths = sorted(self.photos.iterdir()) if self.photos else paths
            known = None if self.photos else [[one] for one in moments]
            with torch.no_grad():
                conds = None if self.text else {PROMPTS[name]: self.family.encode_prompts([PROMPTS[name]])}
            roles.append(Role(name, [PROMPTS[name]] * len(paths), paths, known, conds))
        how: dict[str, Any] = {"center_crop": True, "random_flip": False}
        return Stream([Bucket(32, [roles])], micro_batch_size=self.micro_batch_size, seed=self.seed, **how, **place)


def module_of(
    folder: Path, *, text: bool = False, tuning: Any = None, optim: Any = None, weighting: Any = None, **options: Any
):
    """The module of a model folder with everything that learns, at a rate that shows within a few steps."""
    family = StableDiffusion(str(folder))
    tuning = (tuning or Full)(family, train_text_encoder=text)
    optim = optim or partial(torch.optim.AdamW, lr=1e-3)
    options = {"sched": CONSTANT, "seed": 1, **options}
    return DreamBoothModule(family, tuning, Diffusion.from_scheduler(family.scheduler), weighting, optim, **options)


def run(
    module: DreamBoothModule,
    steps: int,
    *,
    size: int = 2,
    prior: bool = True,
    poison: str = "",
    photos: Path | None = None,
    callbacks: list[pl.Callback] | None = None,
    resume: Path | None = None,
    **trainer: Any,
) -> tuple[pl.Trainer, list[dict[str, float]]]:
    """Train for ``steps`` and return the trainer and every step's metrics."""
    quieten()
    rows: list[dict[str, float]] = []

    class Rows(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
            if (batches := trainer.fit_loop.total_batch_idx + 1) % trainer.accumulate_grad_batches == 0:
                rows.append({name: float(value) for name, value in pl_module.step_metrics.items()})
                assert trainer.global_step == batches // trainer.accumulate_grad_batches

    options = {
        "max_epochs": -1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks or []),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        **trainer,
    }
    resumed = [Resume(resume)] if resume else []
    trainer_ = pl.Trainer(max_steps=steps, callbacks=[Rows(), *(callbacks or []), *resumed], **options)
    text = "text_encoder" in module.learned
    data = Latents(module.family, size, module.seed, prior, text, poison, photos)
    trainer_.fit(module, datamodule=data)
    return trainer_, rows


def trained(steps: int, *settings: str) -> dict[str, torch.Tensor]:
    """What learned in so many steps, begun or gone on with, and its averages; no file but the checkpoint."""
    less = [f"callbacks.{name}=null" for name in ("sample_grid", "evaluate", "export", "report")]
    done = train(compose([*settings, *less, f"trainer.max_steps={steps}"]))
    state = read(done.folder / f"checkpoints/step_{steps:06d}.ckpt", "")
    return {name: value for name, value in state.items() if not name.startswith("optimizer/")}
