"""What a rank holds of the weights that learn, their averages and the optimizer's state, and how to have them whole."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.parallel.parts import like, local, number, part_of, whole
from dreambooth.parallel.tensors import Entry, Part, Stored
from dreambooth.tuning.base import TEXT, swapped

FIXED = ("params", "fused", "foreach", "capturable", "differentiable")  # of a group: the strategy's and not the run's


class Layout:
    """Every rank holds all: one process, and data parallel ranks.

    ``weights/NAME``, ``averages/NAME`` and ``optimizer/KEY/NAME`` are what a checkpoint calls these tensors, whole and
    whatever the strategy. All ranks call each method together, with the same arguments.
    """

    sharded = False  # whether a rank holds a part only
    clips = False  # whether the strategy clips gradients and skips what is not finite by itself

    def __init__(self, module: Any) -> None:
        self.module = module

    @property
    def optimizer(self) -> Any:
        """The optimizer that steps, as torch knows it."""
        return self.module.trainer.strategy.optimizers[0]

    def named(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by their names in ``module.learned``."""
        found: dict[str, nn.Parameter] = self.module.tuning.weights()
        return found

    @property
    def here(self) -> bool:
        """Whether this rank is the one that draws, and writes what all hold."""
        return self.module._trainer is None or bool(self.module.trainer.is_global_zero)

    def entries(self) -> list[Entry]:
        """All tensors of a checkpoint, and of each what this rank writes."""
        named, single = self.named(), torch.float32
        entries = [
            Entry(f"weights/{name}", self.shape(weight), single, partial(self.weight_part, weight))
            for name, weight in named.items()
        ]
        entries += [
            Entry(f"averages/{name}", self.shape(weight), single, partial(self.average_part, place, weight))
            for place, (name, weight) in enumerate(named.items())
            if self.module.ema is not None
        ]
        for name, weight in named.items():
            entries += [
                Entry(f"optimizer/{key}/{name}", *self.size(weight, value), partial(self.state_part, weight, key))
                for key, value in self.states(weight).items()
            ]
        return entries

    def weight_part(self, weight: nn.Parameter) -> Part | None:
        """What this rank writes of a parameter."""
        return part_of(weight, self.here)

    def average_part(self, place: int, weight: nn.Parameter) -> Part | None:
        """What this rank writes of the average at index ``place``."""
        return part_of(self.module.ema[place], self.here)

    def state_part(self, weight: nn.Parameter, key: str) -> Part | None:
        """What this rank writes of a value of the optimizer's state; a number is a tensor without dimensions."""
        value = self.states(weight)[key]
        return part_of(value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64), self.here)

    def shape(self, weight: nn.Parameter) -> tuple[int, ...]:
        """The shape of a parameter when it is whole."""
        return tuple(weight.shape)

    def size(self, weight: nn.Parameter, value: Any) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a whole value of the optimizer's state."""
        return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else ((), torch.float64)

    def weight(self, weight: nn.Parameter) -> Tensor:
        """A parameter, whole, in float32."""
        return whole(weight)

    def average(self, place: int, weight: nn.Parameter) -> Tensor:
        """The average of the parameter of that place, whole."""
        return whole(self.module.ema[place])

    def states(self, weight: nn.Parameter) -> dict[str, Any]:
        """What the optimizer keeps of a parameter, as it is held here."""
        return dict(self.optimizer.state.get(weight, {}))

    def grad_norm(self) -> Tensor:
        """The norm of the whole gradient of the last step, before clipping."""
        norm: Tensor = self.module.grad_norm
        return norm

    def start_averages(self) -> None:
        """Begin averages as copies of the weights."""
        copies = [nn.Parameter(weight.detach().clone(), requires_grad=False) for weight in self.named().values()]
        self.module.ema = nn.ParameterList(copies)

    @torch.no_grad()
    def update_averages(self, decay: float) -> None:
        """a ← decay·a + (1 - decay)·w."""
        # what is frozen on the way keeps the average it had, and may be on another device
        pairs = zip(self.module.ema, self.named().values(), strict=True)
        averages, weights = zip(*(pair for pair in pairs if pair[1].requires_grad), strict=True)
        torch._foreach_lerp_(list(averages), list(weights), 1 - decay)

    @torch.no_grad()
    def end_averages(self) -> None:
        """Before a text encoder is frozen: from here on all that learns knows it as it is, not as it was on average."""
        for average, (name, weight) in zip(self.module.ema or (), self.named().items(), strict=False):
            if name.startswith(TEXT):
                average.copy_(weight)

    @torch.no_grad()
    def set_weights(self, values: Mapping[str, Tensor], averages: Mapping[str, Tensor]) -> None:
        """Take weights, and averages if there are any, from whole tensors by name."""
        for place, (name, weight) in enumerate(self.named().items()):
            self.put(weight, values[name])
            if self.module.ema is not None:
                self.put(self.module.ema[place], averages[name])

    def put(self, held: Tensor, value: Tensor) -> None:
        """Write a whole tensor where this rank holds its part."""
        local(held).copy_(local(like(value, held)))

    def set_states(self, values: Stored, groups: list[dict[str, Any]]) -> None:
        """Take the optimizer's state, ``KEY/NAME``, from whole tensors, and its groups' settings."""
        of_weight: dict[int, dict[str, Any]] = {}
        named = self.named()
        for name, value in values.items():
            key, _, weight = name.partition("/")
            held = like(value, named[weight]) if value.shape == named[weight].shape else value
            of_weight.setdefault(id(named[weight]), {})[key] = number(value) if value.dtype == torch.float64 else held
        current = self.optimizer.state_dict()
        indices = {
            id(weight): index
            for group, numbered in zip(self.optimizer.param_groups, current["param_groups"], strict=True)
            for weight, index in zip(group["params"], numbered["params"], strict=True)
        }
        current["state"] = {indices[weight]: state for weight, state in of_weight.items()}
        self.optimizer.load_state_dict(current)
        self.set_groups(groups)

    def groups(self) -> list[dict[str, Any]]:
        """The groups' settings that JSON can hold."""
        kinds = (bool, int, float, str, tuple, list, type(None))
        return [
            {key: value for key, value in group.items() if key not in FIXED and isinstance(value, kinds)}
            for group in self.optimizer.param_groups
        ]

    def set_groups(self, stored: list[dict[str, Any]]) -> None:
        """Take the groups' settings; what belongs to this strategy stays."""
        for group, values in zip(self.optimizer.param_groups, stored, strict=True):
            group |= {k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in values.items() if k in group}

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within, the networks of the first rank are whole and hold the averages if there are any."""
        if self.module.ema is None:
            yield
            return
        with swapped(list(self.named().values()), [average.data for average in self.module.ema]):
            yield


class Sharded(Layout):
    """Each rank holds a part, in networks that only all ranks together can run.

    The first rank also holds, on the CPU, the frozen weights of the networks in which something learns, and their
    shells without the weights that learn; these are put in for as long as pictures are drawn or files written.
    """

    sharded = True

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        networks = module.learned.items() if module.trainer.is_global_zero else ()
        self.shells = {name: shell(network) for name, network in networks}

    @contextmanager
    def whole(self) -> Iterator[None]:
        learned, networks = self.module.learned, self.module.family.networks
        for place, (name, weight) in enumerate(self.named().items()):
            value = self.weight(weight) if self.module.ema is None else self.average(place, weight)
            if self.shells:
                network, _, rest = name.partition(".")
                assign(self.shells[network], rest, value.detach().cpu().clone())
        kept = {name: learned[name] for name in self.shells}
        try:
            for name, plain in self.shells.items():
                learned[name] = networks[name] = plain.train(kept[name].training)
            yield
            # The others wait among all ranks, who are patient; the strategy's own groups have torch's limits.
            self.module.trainer.strategy.barrier()
        finally:
            for name, network in kept.items():
                learned[name] = networks[name] = network
                empty(self.shells[name].cpu())


def layout_of(module: Any) -> Layout:
    """The layout that the module's strategy names as its ``layout``, made once."""
    kind = getattr(module.trainer.strategy, "layout", Layout)
    return module.layout if type(module.layout) is kind else kind(module)


def shell(network: nn.Module) -> nn.Module:
    """A copy of a network on the CPU: its frozen weights, and nothing in the place of those that learn."""
    memo = {
        id(weight): nn.Parameter(
            torch.empty_like(weight, device="meta") if weight.requires_grad else weight.detach().cpu().clone(),
            requires_grad=weight.requires_grad,
        )
        for weight in network.parameters()
    }
    return copy.deepcopy(network, memo)


def assign(network: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in the place of a parameter that learns."""
    place, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(place), leaf, nn.Parameter(value))


def empty(network: nn.Module) -> None:
    """Take the weights that learn out again."""
    for name, weight in list(network.named_parameters()):
        if weight.requires_grad:
            assign(network, name, torch.empty_like(weight, device="meta"))
