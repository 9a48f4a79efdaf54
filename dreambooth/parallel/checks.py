"""What the machine and the settings must be for a strategy, looked at before anything is loaded or written."""

from typing import Any

import torch
from hydra.utils import get_class, get_object
from omegaconf import DictConfig, OmegaConf

from dreambooth.errors import UserError

# What these do to one number of a weight depends on no other number of it.
ELEMENTWISE = tuple(f"torch.optim.{name}" for name in ("AdamW", "Adam", "NAdam", "RAdam", "RMSprop", "SGD"))


def check(cfg: DictConfig) -> None:
    """Raise UserError for devices that are not there, and for what the strategy cannot do."""
    _check_devices(cfg.trainer)
    node = cfg.trainer.strategy
    if OmegaConf.is_dict(node):
        kind: Any = get_class(node._target_)
        if hasattr(kind, "check"):
            kind.check(cfg)


def check_cut(cfg: DictConfig, strategy: str) -> None:
    """Raise UserError for what would need whole weights within a step, where each rank holds a part of them."""
    model = cfg.model
    if model.optim._target_ not in ELEMENTWISE:
        raise UserError(
            f"model.optim: {strategy} gives each rank a part of a weight, and {model.optim._target_} needs it whole; "
            "type model/optim=adamw, or strategy=ddp"
        )
    tuning = get_object(model.tuning._target_)
    if not getattr(tuning, "may_be_cut", False):
        raise UserError(
            f"model/tuning: {strategy} gives each rank a part of a weight, of which {tuning.__name__} knows nothing; "
            "type model/tuning=full or lora, or strategy=ddp"
        )
    if model.prior == "teacher":
        raise UserError(f"model.prior=teacher: {strategy} cannot set aside what was learned; type strategy=ddp")
    if model.tuning.get("stop_text_encoder_at") is not None:
        raise UserError(
            f"model.tuning.stop_text_encoder_at: {strategy} cannot let go of a part on the way; type strategy=ddp"
        )
    if cfg.trainer.precision == "16-mixed":
        raise UserError(f"trainer.precision=16-mixed: {strategy} has no fp16; type trainer.precision=bf16-mixed")


def _check_devices(trainer: Any) -> None:
    asked, accelerator = trainer.devices, trainer.accelerator
    there = torch.cuda.device_count()
    if accelerator == "cpu" or (there == 0 and (accelerator != "cuda" and torch.backends.mps.is_available())):
        return
    if accelerator in ("gpu", "cuda") and there == 0:
        raise UserError(f"trainer.accelerator={accelerator}: there is no GPU here; type trainer.accelerator=cpu")
    many = max(asked) + 1 if OmegaConf.is_list(asked) and len(asked) else asked
    if there and isinstance(many, int) and many > there:
        raise UserError(f"trainer.devices={asked}: there are {there} GPUs here; type trainer.devices={there} or fewer")
