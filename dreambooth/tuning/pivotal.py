"""A word learns, and adapters of the denoiser with it or after it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from dreambooth.errors import UserError
from dreambooth.families.base import Family
from dreambooth.tuning.base import TEXT
from dreambooth.tuning.lora import Lora
from dreambooth.tuning.words import Word


class Pivotal(Lora):
    """Textual inversion finds the place that the adapters then tune around (Roich et al. 2021, arXiv 2106.05744).

    The word learns for ``embedding_steps`` and is frozen from then on. The adapters learn with it from the first step
    on, or, unless ``together``, only once it is frozen; the text encoder has none.

    Args:
        instance_prompt, class_prompt, placeholder_token, initializer_token, num_vectors: see ``Word``.
        embedding_lr: the word's own learning rate; None: the optimizer's.
        embedding_steps: below 1 a share of all steps; None: the word learns to the end.
        together: whether the adapters learn from the first step on.
        lora: rank, alpha, target_modules and so on, see ``Lora``.
    """

    always_trains_text_encoder = True

    def __init__(
        self,
        family: Family,
        instance_prompt: str,
        class_prompt: str | None,
        placeholder_token: str | None = None,
        initializer_token: str | None = None,
        num_vectors: int = 1,
        embedding_lr: float | None = None,
        embedding_steps: float | None = 0.5,
        together: bool = True,
        **lora: Any,
    ) -> None:
        if embedding_steps is None and not together:
            raise UserError(
                "model.tuning.together=false: the adapters wait for ever; type model.tuning.embedding_steps=0.5"
            )
        words = (instance_prompt, class_prompt, placeholder_token, initializer_token, num_vectors)
        self.word, self.together = Word(family, *words), together
        rates: dict[str, Any] = {"text_encoder_lr": embedding_lr, "stop_text_encoder_at": embedding_steps}
        super().__init__(family, train_text_encoder=True, **rates, **lora)

    def prepare(self, name: str, network: nn.Module) -> None:
        if name == TEXT:
            self.word.attach()
        else:
            super().prepare(name, network)

    def not_yet_training(self, step: int, goal: int) -> list[nn.Parameter]:
        if self.together or self.text_encoder_stopped(step, goal):
            return []
        return [weight for name, weight in self.weights().items() if not name.startswith(TEXT)]

    @contextmanager
    def base(self) -> Iterator[None]:
        with super().base(), self.word.forgotten():
            yield

    @contextmanager
    def merged(self) -> Iterator[None]:
        with super().merged(), self.word.merged():
            yield

    def save(self, folder: Path) -> None:
        """Write pytorch_lora_weights.safetensors and learned_embeds.safetensors."""
        super().save(folder)
        self.word.save(folder)
