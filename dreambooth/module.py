"""DreamBooth as a LightningModule: what learns, one step of it, and its optimizer."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from diffusers.optimization import get_scheduler
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from dreambooth.errors import UserError
from dreambooth.families.base import Family, recompute_activations
from dreambooth.noise import gaussian, seed_of, stratified
from dreambooth.objective import Objective, Weighting
from dreambooth.optimizers import clip, evaluated
from dreambooth.parallel.layout import Layout, layout_of
from dreambooth.reader import Reader
from dreambooth.teacher import Teacher
from dreambooth.tuning.base import Tuning

LOSSES = ("loss", "instance_loss", "prior_loss")
QUARTERS = ("loss_q1", "loss_q2", "loss_q3", "loss_q4")


def prior_loss(per_example: Tensor, is_prior: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Total, instance and prior loss: mean over the instance + ``weight`` x mean over the class (0 if there is none).

    ``per_example`` (B,) and ``is_prior`` (B,) boolean, the two roles in any number and order.
    Source: DreamBooth, arXiv 2208.12242, section 3.2, equation 2 (there the weight is called lambda).
    """
    # Masks and not indexing: an index whose length depends on the data makes a GPU wait.
    instance, prior = (
        torch.where(role, per_example, 0.0).sum() / role.sum().clamp(min=1) for role in (~is_prior, is_prior)
    )
    return instance + weight * prior, instance, prior


class DreamBoothModule(pl.LightningModule):
    """Fine-tunes what a ``tuning`` lets learn of a family on a subject, with or without the prior of its class.

    Registers only the networks in which something learns (and its moving average ``ema``, if a callback keeps one), so
    strategies see no other; their state_dict holds what learns and nothing else. With ``teacher`` the target of
    the class is what the untouched base predicts for it.

    ``step_metrics`` holds the last optimizer step: loss, instance_loss, prior_loss (means over accumulation and ranks),
    loss_q1 to loss_q4 (of the examples in each quarter of the noise levels, from the least noise to the most; NaN where
    there was none), grad_norm (before clipping) and lr, as tensors that nobody has waited for.
    """

    def __init__(
        self,
        family: Family,
        tuning: Tuning,
        objective: Objective,
        weighting: Weighting | None,
        optim: "partial[Optimizer]",
        sched: dict[str, Any],
        prior_loss_weight: float = 1.0,
        noise_offset: float = 0.0,
        gradient_checkpointing: bool = False,
        seed: int = 1234,
        teacher: bool = False,
    ) -> None:
        super().__init__()
        self.family, self.objective, self.weighting = family, objective, weighting
        self.tuning, self.learned = tuning, tuning.learned
        self.resting = Reader(family)  # of a text encoder that learns no longer
        self.stopped_at: int | None = None  # the step before which the text encoder was frozen
        self.teacher = Teacher(tuning) if teacher else None
        self.optim, self.sched = optim, sched
        self.prior_loss_weight, self.noise_offset, self.seed = prior_loss_weight, noise_offset, seed
        self.base = family.fingerprint()
        self.ema: nn.ParameterList | None = None
        self.optimizer: Optimizer | None = None
        self.layout = Layout(self)
        self.step_metrics: dict[str, Tensor] = {}
        self._losses: list[Tensor] = []
        self._quarters: list[Tensor] = []
        if gradient_checkpointing:
            for network in self.learned.values():
                recompute_activations(network)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """One micro-batch (B) of instance and class records; noise and its level are functions of the position."""
        self.seed_dropout(batch)
        moments = batch["moments"] if "moments" in batch else self.encode(batch["pixels"])
        posterior = self.draw(batch, "posterior", (moments.shape[1] // 2, *moments.shape[2:]))
        x0 = self.family.sample_latents(moments, posterior)
        noise = self.draw(batch, "noise", x0.shape[1:])
        if self.noise_offset:  # https://www.crosslabs.org/blog/diffusion-with-offset-noise
            noise = noise + self.noise_offset * self.draw(batch, "offset", (x0.shape[1], 1, 1))
        t = self.objective.sample_t(self.draw_levels(batch))
        x_t = self.objective.add_noise(x0, noise, t)
        target = self.objective.target(x0, noise, t)
        if self.teacher is not None:
            target = self.teacher(batch, x_t, t, target)
        cond = batch["cond"] if "cond" in batch else self.read(batch["prompts"])
        pred = self.family.denoise(x_t, t, cond)
        per_example = self.objective.loss(pred, target, t, self.weighting, batch.get("mask"))
        loss, instance, prior = prior_loss(per_example, batch["is_prior"], self.prior_loss_weight)
        self._losses.append(torch.stack([loss, instance, prior]).detach())
        self._quarters.append(self.objective.by_quarter(per_example.detach(), t))
        return {"loss": loss, "per_example": per_example}

    def seed_dropout(self, batch: dict[str, Any]) -> None:
        """Make a network's own randomness a function of the step (torch.manual_seed is slow: it seeds all devices)."""
        cuda = self.device.type == "cuda"
        default = torch.cuda.default_generators[self.device.index] if cuda else torch.default_generator
        default.manual_seed(seed_of(self.seed, batch["step"], batch["index"][0], "dropout"))

    def draw(self, batch: dict[str, Any], purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Gaussian (B, *shape) of this micro-batch's positions, on the device."""
        return self.send(gaussian(tuple(shape), self.seed, batch["step"], batch["index"], purpose))

    def draw_levels(self, batch: dict[str, Any]) -> Tensor:
        """Noise levels (B,) in [0, 1), spread evenly over the global batch of each role."""
        roles = [stratified(batch["global_size"], self.seed, batch["step"], role) for role in ("instance", "prior")]
        return self.send(torch.cat(roles)[batch["index"]])

    def send(self, value: Tensor) -> Tensor:
        """To the device; through pinned memory, as a GPU would otherwise have to finish its work first."""
        return (value.pin_memory() if self.device.type == "cuda" else value).to(self.device, non_blocking=True)

    def encode(self, pixels: Tensor) -> Tensor:
        """Moments (B, 2C, h, w) of pictures, as the latent cache holds them: no gradient, the VAE's own dtype."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self.family.encode_pictures(pixels)

    def read(self, prompts: list[str]) -> dict[str, Tensor]:
        """Conditions (B, …) of prompts: each distinct one is read once a batch, or once for all when none learns."""
        if self.stopped_at is not None:
            return self.resting(prompts, self.device)
        distinct = list(dict.fromkeys(prompts))
        rows = self.send(torch.tensor([distinct.index(prompt) for prompt in prompts]))
        return {name: value[rows] for name, value in self.family.encode_prompts(distinct).items()}

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """From step ``tuning.stop_text_encoder_at`` on the text encoder is frozen, and read once a prompt."""
        if self.stopped_at is not None or not self.tuning.text_encoder_stopped(batch["step"], self.trainer.max_steps):
            return
        self.stopped_at = batch["step"]
        self.layout.end_averages()
        for weight in self.tuning.freeze_text_encoder():
            weight.grad = None
            for optimizer in self.trainer.optimizers:
                optimizer.state.pop(weight, None)
        if isinstance(self.trainer.strategy, DDPStrategy):  # would wait for the gradients of all that learned at first
            self.trainer.strategy.model = self
            # Buffers are the same everywhere, and those of the text encoder now lie where NCCL cannot send from.
            self.trainer.strategy._ddp_kwargs["broadcast_buffers"] = False
            self.trainer.strategy.configure_ddp()

    def configure_model(self) -> None:
        """Cut the weights over the ranks, under a strategy that does."""
        self.layout = layout_of(self)

    def configure_optimizers(self) -> Any:
        """Optimizer and diffusers' schedule (by its name), advanced at every optimizer step."""
        if any(weight.dtype != torch.float32 for weight in self.learning()):
            raise UserError("trained weights must stay float32: type trainer.precision=bf16-mixed, 16-mixed or 32-true")
        # One fused pass over the weights takes a fifth of the usual one's time; Lightning's fp16 scaling rules it out.
        fused = {"fused": True} if "fused" in inspect.signature(self.optim.func).parameters and not self.scaled else {}
        self.optimizer = optimizer = self.optim(self.tuning.groups(), **{**fused, **self.optim.keywords})
        if hasattr(optimizer, "train"):  # a Schedule-Free one, see averaged()
            optimizer.train()
        schedule = get_scheduler(
            self.sched["name"],
            optimizer,
            num_warmup_steps=self.sched["warmup_steps"],
            # task=prepare has none; and a warm-up that never ends would have diffusers divide by the rest of the way
            num_training_steps=max(self.trainer.max_steps, self.sched["warmup_steps"] + 1),
            num_cycles=self.sched["num_cycles"],
            power=self.sched["power"],
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, and skip the update when a gradient is not finite, unless the strategy does both by itself."""
        if self.layout.clips:
            return
        for weight in self.tuning.not_yet_training(self.trainer.global_step, self.trainer.max_steps):
            weight.grad = None  # so neither updated nor decayed; it had one as DDP waits for all
        self.grad_norm = clip(optimizer, gradient_clip_val, gradient_clip_algorithm == "value", self.scaled)

    @property
    def scaled(self) -> bool:
        """Whether Lightning scales the loss (fp16), and skips what overflows."""
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    @property
    def loss_scale(self) -> Tensor | None:
        """By what fp16 multiplies the loss, on the device (``GradScaler.get_scale`` would wait for it), or None."""
        scale: Tensor | None = getattr(getattr(self.trainer.precision_plugin, "scaler", None), "_scale", None)
        return scale

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, then gather ``step_metrics``; a strategy that accumulates by itself comes here in every micro-batch."""
        rate = optimizer.param_groups[0]["lr"]
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches:
            return
        optimizer.zero_grad()  # Lightning would keep the gradients, a copy of all weights, beside the next activations
        losses = self.trainer.strategy.reduce(torch.stack(self._losses).mean(0), reduce_op="mean")
        sums, counts = self.trainer.strategy.reduce(torch.stack(self._quarters).sum(0), reduce_op="sum")
        self._losses.clear()
        self._quarters.clear()
        self.step_metrics = dict(zip(LOSSES, losses, strict=True)) | dict(zip(QUARTERS, sums / counts, strict=True))
        self.step_metrics |= {"grad_norm": self.layout.grad_norm(), "lr": torch.tensor(rate, dtype=torch.float64)}

    def learning(self) -> list[nn.Parameter]:
        """The parameters that learn, in the order of ``ema``."""
        return list(self.tuning.weights().values())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the family of the first rank is what the training made of it so far, adapters apart; all enter.

        The networks are whole and hold the averaged weights if there are any, and the scheduler has the noise levels
        that were learned. Before the first step the base stays as it came.
        """
        own = self.family.scheduler
        with self.layout.whole(), evaluated(self.optimizer, self.learning()):
            if self.global_step and self.objective.scheduler is not None:
                self.family.scheduler = self.objective.scheduler
            try:
                yield
            finally:
                self.family.scheduler = own

    @contextmanager
    def finished(self) -> Iterator[None]:
        """Within, the networks are what ``pipeline/`` would hold, and what is sampled: averaged, adapters merged."""
        with self.averaged(), self.tuning.merged() if self.layout.here else nullcontext():
            yield

    def settle_on(self, weights: dict[str, Tensor]) -> None:
        """Take these, whole and by name, for what was learned: the last weights and all averages of them go."""
        self.ema = self.optimizer = None
        self.layout.set_weights(weights, {})
