"""What a way of tuning owes the rest of the program."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dreambooth.families.base import Family

TEXT = "text_encoder"  # what the names of all text encoders begin with


class Tuning(ABC):
    """What learns of a family. Freezes the rest; from here on the family's networks hold what learns.

    ``learned`` are the networks that the module registers, by their names in the family; ``names`` the parameters in
    them that learn, fixed for the whole run. The state_dict of ``learned`` holds these and nothing else, and loading
    one is strict about them.

    Args:
        family: the networks, with the weights of the source.
        train_text_encoder: whether something of the text encoder learns, too.
        text_encoder_lr: its own learning rate; None: the optimizer's.
        stop_text_encoder_at: the optimizer step from which on it is frozen; None: it learns to the end. A value below 1
            is a share of all steps; only ``Pivotal`` passes one.
    """

    saves_adapter = False  # whether what learned is files of its own beside the base (``save``)
    can_change_class = True  # whether what learns can change pictures of the class
    always_trains_text_encoder = False  # whether something of a text encoder learns, whatever the settings
    supports_sharding = False  # whether it works where each rank holds a part of a weight: fsdp, ZeRO

    def __init__(
        self,
        family: Family,
        train_text_encoder: bool = False,
        text_encoder_lr: float | None = None,
        stop_text_encoder_at: float | None = None,
    ) -> None:
        family.fingerprint()  # while the weights are those of the source
        self.family = family
        self.text_encoder_lr, self.stop_text_encoder_at = text_encoder_lr, stop_text_encoder_at
        networks = {
            name: network
            for name, network in family.trainable_networks().items()
            if train_text_encoder or not name.startswith(TEXT)
        }
        for name, network in family.networks.items():
            network.requires_grad_(False)
            if name in networks:
                self.prepare(name, network)
            network.train(name in networks)
        self.learned = nn.ModuleDict(networks)
        self.names = frozenset(name for name, weight in self.learned.named_parameters() if weight.requires_grad)
        # partial: torch marks what it is given, which a bound method does not allow
        self.learned.register_state_dict_post_hook(partial(Tuning._forget_frozen, self))
        self.learned.register_load_state_dict_post_hook(partial(Tuning._excuse_frozen, self))

    @abstractmethod
    def prepare(self, name: str, network: nn.Module) -> None:
        """Let the right parameters of a frozen network require gradients, adding to it what must be added."""

    def weights(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name, in the order of the networks; also those of a text encoder at rest."""
        return {name: weight for name, weight in self.learned.named_parameters() if name in self.names}

    def groups(self) -> list[Any]:
        """What the optimizer is given: the parameters, or groups of them where the text encoder has its own rate."""
        weights = self.weights()
        if self.text_encoder_lr is None or not self.learns_text:
            return list(weights.values())
        text = [weight for name, weight in weights.items() if name.startswith(TEXT)]
        rest = [weight for name, weight in weights.items() if not name.startswith(TEXT)]
        return [group for group in ({"params": rest}, {"params": text, "lr": self.text_encoder_lr}) if group["params"]]

    @property
    def learns_text(self) -> bool:
        """Whether something of a text encoder learns, or has learned before it was stopped."""
        return any(name.startswith(TEXT) for name in self.learned)

    def text_encoder_stopped(self, step: int, goal: int) -> bool:
        """Whether a text encoder that has learned is at rest in an optimizer step of ``goal``."""
        if not self.learns_text or (stop := self.stop_text_encoder_at) is None:
            return False
        return step >= (stop * goal if stop < 1 else stop)

    def freeze_text_encoder(self) -> list[nn.Parameter]:
        """Freeze the text encoders; the parameters that learn no longer."""
        for name, network in self.learned.items():
            if name.startswith(TEXT):
                network.requires_grad_(False).eval()
        return [weight for name, weight in self.weights().items() if name.startswith(TEXT)]

    def not_yet_training(self, step: int, goal: int) -> list[nn.Parameter]:
        """The parameters that do not learn yet in an optimizer step of ``goal``."""
        return []

    def remember(self) -> None:
        """Keep what ``untouched`` needs; called before the first step, while nothing has learned."""
        return

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Within, the networks compute what the base computes, bit for bit, in evaluation; not for gradients."""
        modes = {name: network.training for name, network in self.learned.items()}
        self.learned.eval()
        try:
            with self.base():
                yield
        finally:
            for name, training in modes.items():
                self.learned[name].train(training)

    @abstractmethod
    def base(self) -> AbstractContextManager[None]:
        """A context in which the weights are, or count as, those of the source."""

    def merged(self) -> AbstractContextManager[None]:
        """Within, the networks alone, as a pipeline without us holds them, compute all that was learned."""
        return nullcontext()

    def save(self, folder: Path) -> None:
        """Write what learned as files of its own into ``folder``, when it is ``saves_adapter``."""
        raise NotImplementedError

    def _forget_frozen(self, _: nn.Module, state: dict[str, Tensor], prefix: str, __: Any) -> None:
        for name in [key for key in state if key.startswith(prefix) and key.removeprefix(prefix) not in self.names]:
            del state[name]

    def _excuse_frozen(self, _: nn.Module, found: Any) -> None:
        """Frozen weights are no missing ones, whether the networks are loaded alone or as part of the module."""
        frozen = {name for name, _ in chain(self.learned.named_parameters(), self.learned.named_buffers())} - self.names
        found.missing_keys[:] = [key for key in found.missing_keys if key.removeprefix("learned.") not in frozen]


def swap(weights: list[nn.Parameter], others: list[Tensor]) -> None:
    """Exchange the values of parameters with as many tensors, on the parameters' devices; nothing is copied there."""
    for place, (weight, other) in enumerate(zip(weights, others, strict=True)):
        value = weight.data
        weight.data = other.to(value.device)
        others[place] = value


@contextmanager
def swapped(weights: list[nn.Parameter], others: list[Tensor]) -> Iterator[None]:
    """Within, the parameters have the values of the others."""
    swap(weights, others)
    try:
        yield
    finally:
        swap(weights, others)
