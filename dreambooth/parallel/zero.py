"""DeepSpeed's ZeRO (Rajbhandari et al. 2019, arXiv 1910.02054): moments, gradients and weights cut over the ranks."""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from omegaconf import DictConfig
from packaging.version import Version
from pytorch_lightning.plugins.precision import DeepSpeedPrecision
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from dreambooth.errors import UserError
from dreambooth.parallel.checks import check_sharding
from dreambooth.parallel.layout import Sharded
from dreambooth.parallel.parts import number
from dreambooth.parallel.pieces import gather, part_in, scatter
from dreambooth.parallel.tensors import Part, Stored, part_of_stored

# Older ones step by a gradient that is no number, at every stage: they look for it where weights have 16 bits only.
OLDEST = "0.19.8"


class ZeroLayout(Sharded):
    """The masters, in float32, and the optimizer's state are flat: one piece of each group of parameters a rank.

    Where a parameter lies in the pieces is known to DeepSpeed: see ``pieces`` for stages 1 and 2; its ``safe_*``
    functions for stage 3.
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
        if self.shards_weights:
            self.set_own_weights(values)
            return
        for name, weight in self.named().items():
            weight.copy_(values[name])
            scatter(weight, values, name, self.pieces)
            if self.module.ema is not None:
                scatter(weight, averages, name, list(self.module.ema))

    def set_own_weights(self, values: Mapping[str, Tensor]) -> None:
        """What this rank holds at stage 3, as DeepSpeed reads its own folder.

        Small weights that all ranks hold whole are sent again where they did already, and left apart before the first
        step: DeepSpeed learns in that step who reads which, and later would hand out one that is still on its way.
        """
        from deepspeed.utils import safe_set_local_fp32_param

        whole = any(weight.ds_status.name == "AVAILABLE" for weight in self.zero.persistent_parameters)
        self.zero.checkpoint_event_prologue()
        for name, weight in self.named().items():
            part = self.part(weight, values, name)
            weight.ds_tensor.copy_(part)  # type: ignore[attr-defined]
            safe_set_local_fp32_param(weight, part)
        if whole:
            self.zero.checkpoint_event_epilogue()

    @torch.no_grad()
    def set_states(self, values: Stored, groups: list[dict[str, Any]]) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        named, state = self.named(), self.optimizer.state
        for name in values:
            key, _, weight = name.partition("/")
            shape, dtype = values.size(name)
            if shape != self.shape(named[weight]):
                value = values[name]
                for piece in self.pieces:
                    state[piece][key] = number(value) if dtype == torch.float64 else self.scalar(value, piece)
                continue
            for piece in self.pieces:
                if key not in state[piece]:  # setdefault would fill one for every parameter
                    state[piece][key] = torch.zeros_like(piece, dtype=dtype)
            if self.shards_weights:
                safe_set_local_optimizer_state(named[weight], self.part(named[weight], values, name), key)
            else:
                scatter(named[weight], values, name, [state[piece][key] for piece in self.pieces])
        self.set_groups(groups)

    def scalar(self, value: Tensor, piece: Tensor) -> Tensor:
        """A number of torch's optimizers, where they look for it."""
        return value.clone().to(piece.device if self.optimizer.param_groups[0].get("fused") else "cpu")

    def part(self, weight: nn.Parameter, values: Mapping[str, Tensor], name: str) -> Tensor:
        """What this rank holds of a tensor at stage 3: equal parts, the last one filled up. No more of it is read."""
        size = weight.ds_tensor.numel()  # type: ignore[attr-defined]
        found = part_of_stored(values, name, size * self.module.trainer.global_rank, size)
        return torch.nn.functional.pad(found, (0, size - found.numel())) if found.numel() < size else found


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
        _check_installed(stage)
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


def _check_installed(stage: int) -> None:
    """Raise UserError without DeepSpeed, and with one that is too old."""
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        raise UserError(
            f"strategy=deepspeed_{stage} needs DeepSpeed: type pip install 'dreambooth[deepspeed]'"
        ) from None
    if Version(found) < Version(OLDEST):
        raise UserError(
            f"strategy=deepspeed_{stage}: DeepSpeed {found} would learn from a gradient that is no number; type "
            f"pip install 'deepspeed>={OLDEST}'"
        )
