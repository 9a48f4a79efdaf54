"""DeepSpeed's ZeRO (Rajbhandari et al. 2019, arXiv 1910.02054): moments, gradients and weights cut over the ranks."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from omegaconf import DictConfig
from pytorch_lightning.plugins.precision import DeepSpeedPrecision
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from dreambooth.errors import UserError
from dreambooth.parallel.checks import check_sharding
from dreambooth.parallel.layout import Sharded
from dreambooth.parallel.parts import number
from dreambooth.parallel.tensors import Part


class ZeroLayout(Sharded):
    """The masters, in float32, and the optimizer's state are flat: one piece of each group of parameters a rank.

    Where a parameter lies in the pieces is known to DeepSpeed: ``_hp_mapping`` at stages 1 and 2, its ``safe_*``
    functions at stage 3.
    """

    clips = True

    @property
    def zero(self) -> Any:
        """DeepSpeed's optimizer, around the one that steps."""
        return self.module.trainer.strategy.model.optimizer

    @property
    def optimizer(self) -> Any:
        return self.zero.optimizer

    @property
    def shards_weights(self) -> bool:
        """Whether this is stage 3."""
        return bool(self.module.trainer.strategy.zero_stage_3)

    @property
    def pieces(self) -> list[Tensor]:
        """This rank's piece of the masters of each group."""
        zero = self.zero
        return list(zero.fp32_partitioned_groups_flat if self.shards_weights else zero.single_partition_of_fp32_groups)

    def shape(self, weight: nn.Parameter) -> tuple[int, ...]:
        return tuple(getattr(weight, "ds_shape", weight.shape))

    def size(self, weight: nn.Parameter, value: Any) -> tuple[tuple[int, ...], torch.dtype]:
        if isinstance(value, Tensor) and value.shape == self.pieces[0].shape:
            return self.shape(weight), value.dtype
        return super().size(weight, value)

    def weight(self, weight: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(weight)

    def average(self, place: int, weight: nn.Parameter) -> Tensor:
        return gather(weight, list(self.module.ema))

    def states(self, weight: nn.Parameter) -> dict[str, Any]:
        return dict(self.optimizer.state.get(self.pieces[0], {}))

    def weight_part(self, weight: nn.Parameter) -> Part | None:
        from deepspeed.utils import safe_get_local_fp32_param

        if self.shards_weights:
            return self.own_part(weight, safe_get_local_fp32_param(weight))
        return part_in(weight, self.pieces)

    def average_part(self, place: int, weight: nn.Parameter) -> Part | None:
        return part_in(weight, list(self.module.ema))

    def state_part(self, weight: nn.Parameter, key: str) -> Part | None:
        from deepspeed.utils import safe_get_local_optimizer_state

        value = self.states(weight)[key]
        if not isinstance(value, Tensor) or value.shape != self.pieces[0].shape:
            return super().state_part(weight, key)
        if self.shards_weights:
            return self.own_part(weight, safe_get_local_optimizer_state(weight, key))
        return part_in(weight, [self.optimizer.state[piece][key] for piece in self.pieces])

    def own_part(self, weight: nn.Parameter, held: Tensor) -> Part | None:
        """What this rank holds of a parameter at stage 3, without the padding at the end."""
        begin = self.module.trainer.global_rank * held.numel()
        count = max(0, min(held.numel(), weight.ds_numel - begin))  # type: ignore[attr-defined]
        return (begin, held[:count]) if count else None

    def grad_norm(self) -> Tensor:
        return torch.as_tensor(float(self.module.trainer.strategy.model.get_global_grad_norm()))

    def start_averages(self) -> None:
        copies = [nn.Parameter(piece.detach().clone(), requires_grad=False) for piece in self.pieces]
        self.module.ema = nn.ParameterList(copies)

    @torch.no_grad()
    def update_averages(self, decay: float) -> None:
        torch._foreach_lerp_(list(self.module.ema), self.pieces, 1 - decay)

    @torch.no_grad()
    def set_weights(self, values: Mapping[str, Tensor], averages: Mapping[str, Tensor]) -> None:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_local_fp32_param

        for name, weight in self.named().items():
            value = values[name]
            if self.shards_weights:
                with GatheredParameters([weight], modifier_rank=0):
                    weight.copy_(value)
                safe_set_local_fp32_param(weight, self.part(weight, value))
            else:
                weight.copy_(value)
                scatter(weight, value, self.pieces)
                if self.module.ema is not None:
                    scatter(weight, averages[name], list(self.module.ema))

    @torch.no_grad()
    def set_states(self, values: Mapping[str, Tensor], groups: list[dict[str, Any]]) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        named, state = self.named(), self.optimizer.state
        for name, value in values.items():
            key, _, weight = name.partition("/")
            cut = tuple(value.shape) == self.shape(named[weight])
            for piece in self.pieces:
                if cut and key not in state[piece]:  # setdefault would fill one for every parameter
                    state[piece][key] = torch.zeros_like(piece, dtype=value.dtype)
                elif not cut:
                    state[piece][key] = number(value) if value.dtype == torch.float64 else self.scalar(value, piece)
            if cut and self.shards_weights:
                safe_set_local_optimizer_state(named[weight], self.part(named[weight], value), key)
            elif cut:
                scatter(named[weight], value, [state[piece][key] for piece in self.pieces])
        self.set_groups(groups)

    def scalar(self, value: Tensor, piece: Tensor) -> Tensor:
        """A number of torch's optimizers, where they look for it."""
        return value.clone().to(piece.device if self.optimizer.param_groups[0].get("fused") else "cpu")

    def part(self, weight: nn.Parameter, value: Tensor) -> Tensor:
        """What this rank holds of a whole tensor at stage 3: equal parts, the last one filled up."""
        size, trainer = weight.ds_tensor.numel(), self.module.trainer  # type: ignore[attr-defined]
        filled = torch.nn.functional.pad(value.flatten(), (0, size * trainer.world_size - value.numel()))
        return filled.narrow(0, size * trainer.global_rank, size)


class AutocastPrecision(DeepSpeedPrecision):
    """Leaves inputs as they are: DeepSpeed's engine runs the steps under torch.autocast, with weights in float32."""

    def convert_input(self, data: Any) -> Any:
        return data

    def backward(self, *args: Any, **kwargs: Any) -> None:
        """Lightning has divided the loss by the number of micro-batches that make a step; the engine would again."""
        super().backward(*args, scale_wrt_gas=False, **kwargs)


class ZeroStrategy(DeepSpeedStrategy):
    """ZeRO with weights in float32 and torch's own optimizers, which need no compiler, also where they are offloaded.

    Args:
        stage: 1, 2 or 3.
        offload: keep moments and masters, and at stage 3 the weights, in the memory of the host.
    """

    layout = ZeroLayout
    gpus_only = True

    def __init__(self, stage: int, offload: bool = False) -> None:
        super().__init__(
            stage=stage,
            offload_optimizer=offload,
            offload_parameters=offload and stage == 3,
            logging_batch_size_per_gpu=1,  # DeepSpeed only prints it
        )
        self.config["zero_force_ds_cpu_optimizer"] = False  # type: ignore[index]

    @classmethod
    def check(cls, cfg: DictConfig) -> None:
        """Raise UserError where it cannot run, and for settings that it has no answer to."""
        stage, trainer = cfg.trainer.strategy.stage, cfg.trainer
        if find_spec("deepspeed") is None:
            raise UserError(f"strategy=deepspeed_{stage} needs DeepSpeed: type pip install 'dreambooth[deepspeed]'")
        if cls.gpus_only and (trainer.accelerator == "cpu" or not torch.cuda.is_available()):
            raise UserError(f"strategy=deepspeed_{stage} needs a GPU: type strategy=ddp or strategy=fsdp")
        check_sharding(cfg, f"strategy=deepspeed_{stage}")
        if trainer.get("gradient_clip_algorithm") == "value":
            raise UserError("trainer.gradient_clip_algorithm=value: DeepSpeed clips by the norm only; type norm")
        if stage == 3 and cfg.model.ema.decay is not None:
            raise UserError(
                "model.ema.decay: ZeRO stage 3 keeps no averages; type strategy=deepspeed_2, strategy=fsdp or "
                "model.ema.decay=null"
            )

    def setup(self, trainer: Any) -> None:
        if self.precision_plugin.precision == "bf16-mixed":
            # Left empty, the list of modules that may send in bf16 lets gradients be summed in float32.
            autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
            self.config |= {"bf16": {"enabled": False}, "torch_autocast": autocast}  # type: ignore[operator]
        self.precision_plugin = AutocastPrecision(self.precision_plugin.precision)  # type: ignore[arg-type]
        super().setup(trainer)

    def teardown(self) -> None:
        """Leave everything where it is: the pieces are put together once more when the run is exported."""
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()


def gather(weight: nn.Parameter, pieces: list[Tensor]) -> Tensor:
    """A parameter's values, whole, from flat pieces that lie as the masters do (stages 1 and 2)."""
    flat = torch.zeros(weight.numel(), device=weight.device)
    if weight._hp_mapping is not None:  # type: ignore[attr-defined]
        here, there = _places(weight, pieces)
        flat.narrow(*here).copy_(there)
    torch.distributed.all_reduce(flat)
    return flat.view_as(weight)


def part_in(weight: nn.Parameter, pieces: list[Tensor]) -> Part | None:
    """What this rank holds of a parameter, in flat pieces that lie as the masters do (stages 1 and 2)."""
    if weight._hp_mapping is None:  # type: ignore[attr-defined]
        return None
    (_, begin, _), values = _places(weight, pieces)
    return begin, values


def scatter(weight: nn.Parameter, value: Tensor, pieces: list[Tensor]) -> None:
    """Write what this rank holds of a parameter's values into flat pieces (stages 1 and 2)."""
    if weight._hp_mapping is not None:  # type: ignore[attr-defined]
        here, there = _places(weight, pieces)
        there.copy_(value.flatten().narrow(*here))


def _places(weight: nn.Parameter, pieces: list[Tensor]) -> tuple[tuple[int, int, int], Tensor]:
    """Which part of a parameter this rank holds (dimension, start, length), and the part of a piece that it is."""
    found: Any = weight._hp_mapping  # type: ignore[attr-defined]
    here, there = found.lp_fragment_address, found.hp_fragment_address
    return (0, here.start, here.numel), pieces[found.param_group_index].narrow(0, there.start, there.numel)
