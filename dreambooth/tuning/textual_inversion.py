"""A word learns, and no network."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import nn

from dreambooth.families.base import Family
from dreambooth.tuning.base import TEXT, Tuning
from dreambooth.tuning.words import Word


class TextualInversion(Tuning):
    """The embeddings of one new word learn (Gal et al. 2022, arXiv 2208.01618); all else stays what it was.

    Args:
        family: see ``Tuning``.
        embedding_lr: the learning rate; None: the optimizer's.
        word: how the word is found and begins, see ``Word``.
    """

    saves_adapter, can_change_class, always_trains_text_encoder, supports_sharding = True, False, True, True

    def __init__(self, family: Family, embedding_lr: float | None = None, **word: Any) -> None:
        self.word = Word(family, **word)
        super().__init__(family, train_text_encoder=True, text_encoder_lr=embedding_lr)

    def prepare(self, name: str, network: nn.Module) -> None:
        if name == TEXT:
            self.word.attach()

    def base(self) -> AbstractContextManager[None]:
        return self.word.forgotten()

    def merged(self) -> AbstractContextManager[None]:
        return self.word.merged()

    def save(self, folder: Path) -> None:
        """Write learned_embeds.safetensors."""
        self.word.save(folder)
