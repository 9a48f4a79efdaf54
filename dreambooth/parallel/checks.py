"""What the machine and the settings must be for a strategy, looked at before anything is loaded or written."""

import os
from typing import Any

import torch
from hydra.utils import get_class, get_object
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from dreambooth.devices import all_devices, devices_of
from dreambooth.errors import UserError
from dreambooth.slurm import device_count, launched_by_srun

# What these do to one number of a weight depends on no other number of it.
ELEMENTWISE = tuple(f"torch.optim.{name}" for name in ("AdamW", "Adam", "NAdam", "RAdam", "RMSprop", "SGD"))

SHARDING = (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)
# Lightning's names of strategies under which every rank holds all and processes are started as this project does it.
WHOLE = ("auto", "single_device", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true")


def check(cfg: DictConfig) -> None:
    """Raise UserError for devices that are not there, and for what the strategy cannot do."""
    _check_devices(cfg.trainer)
    _check_srun(cfg.trainer)
    _check_torchrun(cfg.trainer)
    node = cfg.trainer.strategy
    if OmegaConf.is_dict(node):
        kind: Any = get_class(node._target_)
        if hasattr(kind, "check"):
            kind.check(cfg)
        elif issubclass(kind, SHARDING):  # its checkpoints and pipelines would hold what one rank has
            card = _card("deepspeed_stage_2" if issubclass(kind, DeepSpeedStrategy) else "fsdp")
            raise UserError(
                f"trainer.strategy._target_={node._target_}: type strategy={card}, whose checkpoints are whole"
            )
    elif node not in WHOLE:
        raise UserError(
            f"trainer.strategy={node}: by a name there are only {', '.join(WHOLE)}; type strategy={_card(str(node))}"
        )
    on_cpu = cfg.trainer.accelerator == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if cfg.trainer.precision == "16-mixed" and on_cpu:  # Lightning would take bf16 instead
        raise UserError("trainer.precision=16-mixed needs a GPU; type trainer.precision=bf16-mixed, or 32-true")


def check_sharding(cfg: DictConfig, strategy: str) -> None:
    """Raise UserError for what would need whole weights within a step, where each rank holds a part of them."""
    model = cfg.model
    if model.optim._target_ not in ELEMENTWISE:
        raise UserError(
            f"model.optim: {strategy} gives each rank a part of a weight, and {model.optim._target_} needs it whole; "
            "type model/optim=adamw, or strategy=ddp"
        )
    tuning = get_object(model.tuning._target_)
    if not getattr(tuning, "supports_sharding", False):
        raise UserError(
            f"model/tuning: {strategy} gives each rank a part of a weight, of which {tuning.__name__} knows nothing; "
            "type one of the cards of model/tuning, or strategy=ddp"
        )
    if model.prior == "teacher" and (
        not tuning.saves_adapter or tuning.always_trains_text_encoder or model.tuning.get("train_text_encoder", False)
    ):
        raise UserError(
            f"model.prior=teacher: {strategy} sets aside an adapter of the denoiser, nothing else; type "
            "model/tuning=lora with model.tuning.train_text_encoder=false, or strategy=ddp"
        )
    for key in ("stop_text_encoder_at", "embedding_steps"):
        if model.tuning.get(key) is not None:
            raise UserError(
                f"model.tuning.{key}: {strategy} cannot let go of a part on the way; type model.tuning.{key}=null, or "
                "strategy=ddp"
            )
    if cfg.trainer.precision == "16-mixed":
        raise UserError(f"trainer.precision=16-mixed: {strategy} has no fp16; type trainer.precision=bf16-mixed")


def _card(name: str) -> str:
    """The card that is nearest to one of Lightning's strategies: its own FSDP and ZeRO know nothing of checkpoints."""
    if name.startswith("deepspeed"):
        stage = next((stage for stage in "123" if f"_{stage}" in name), "2")
        return f"deepspeed_{stage}" + "_offload" * ("offload" in name and stage != "1")
    return "fsdp" if name.startswith("fsdp") else "ddp"


def _check_srun(trainer: Any) -> None:
    """Raise UserError where ``auto`` is another number than SLURM started; of a number ``slurm.check`` has said it."""
    if not launched_by_srun() or "TORCHELASTIC_RUN_ID" in os.environ or device_count(trainer.devices) is not None:
        return
    here, started = all_devices(trainer.accelerator), int(os.environ.get("SLURM_NTASKS_PER_NODE", 1))
    if here != started:
        raise UserError(
            f"trainer.devices={trainer.devices} is {here} here, but SLURM starts {started} tasks on each node: type "
            f"trainer.devices={started}, or sbatch --ntasks-per-node={here}"
        )


def _check_torchrun(trainer: Any) -> None:
    """Raise UserError when the trainer wants other processes than torchrun started: each would train by itself."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" not in env or "LOCAL_WORLD_SIZE" not in env:
        return
    here, devices = int(env["LOCAL_WORLD_SIZE"]), devices_of(trainer)
    if devices != here:
        raise UserError(
            f"trainer.devices={trainer.devices}, but torchrun started {here} processes here: type "
            f"trainer.devices={here}, or torchrun --nproc-per-node={devices}"
        )
    if trainer.num_nodes != (nodes := int(env.get("WORLD_SIZE", here)) // here):
        raise UserError(
            f"trainer.num_nodes={trainer.num_nodes}, but torchrun started processes on {nodes} nodes: type "
            f"trainer.num_nodes={nodes}, or torchrun --nnodes={trainer.num_nodes}"
        )


def _check_devices(trainer: Any) -> None:
    asked, accelerator = trainer.devices, trainer.accelerator
    there = torch.cuda.device_count()
    if trainer.num_nodes > 1 and not _started():
        raise UserError(
            f"trainer.num_nodes={trainer.num_nodes}: nothing here starts the processes of other nodes; put srun or "
            "torchrun --nnodes in front, or set MASTER_ADDR, MASTER_PORT and NODE_RANK on each node"
        )
    if accelerator in ("gpu", "cuda") and there == 0:
        raise UserError(f"trainer.accelerator={accelerator}: there is no GPU here; type trainer.accelerator=cpu")
    if accelerator == "cpu" or there == 0:
        if accelerator == "cpu" or not torch.backends.mps.is_available():
            _check_processes(asked)
        return
    numbers = _numbers(asked)
    many = max(numbers) + 1 if numbers else device_count(asked)
    if many is not None and many > there:
        if launched_by_srun() and os.environ.get("SLURM_NTASKS_PER_NODE") == str(many):
            raise UserError(
                f"trainer.devices={asked}, but of its node's GPUs each task sees {there}: type sbatch "
                f"--gpus-per-node={many}, without --gpus-per-task and --gpu-bind"
            )
        raise UserError(f"trainer.devices={asked}: there are {there} GPUs here; type trainer.devices={there} or fewer")


def _numbers(asked: Any) -> list[int]:
    """The devices that are named one by one, as in [0,7] or '0,7'; empty where a count is asked for."""
    if isinstance(asked, str):
        parts = [part.strip() for part in asked.split(",")] if "," in asked else []
        return [int(part) for part in parts if part.isdigit()]
    return list(asked) if OmegaConf.is_list(asked) else []


def _check_processes(asked: Any) -> None:
    """Raise UserError for more processes than CPUs; two are always let be, to try on any machine how ranks share."""
    many, there = device_count(asked), max(2, os.cpu_count() or 1)
    if many is not None and many > there:
        raise UserError(
            f"trainer.devices={asked}: each is a process, and there are {os.cpu_count()} CPUs here; "
            f"type trainer.devices={there} or fewer"
        )


def _started() -> bool:
    """Whether somebody starts a process on every node: SLURM, torchrun, or who typed the variables Lightning reads."""
    env = os.environ.keys()
    return launched_by_srun() or "TORCHELASTIC_RUN_ID" in env or {"MASTER_ADDR", "NODE_RANK"} <= env
