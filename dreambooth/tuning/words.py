"""A new word: tokens of its own in the tokenizer, and rows of its own after the text encoder's table of embeddings."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dreambooth.errors import UserError
from dreambooth.families.base import ADDED, Family
from dreambooth.prompts import MARKS, identifier_of
from dreambooth.tuning.base import TEXT

FILE = "learned_embeds.safetensors"  # the name by which diffusers' load_textual_inversion looks in a folder


class Table(nn.Module):
    """A frozen table of embeddings (V, D) in which the rows ``first`` to ``first`` + n are others, (n, D), and learn.

    The table itself is neither copied nor does it get a gradient; it keeps its name in the network, ``weight``.
    """

    def __init__(self, table: nn.Embedding, first: int, rows: Tensor) -> None:
        super().__init__()
        self.weight, self.first = table.weight, first
        self.register_parameter(ADDED, nn.Parameter(rows))

    @property
    def rows(self) -> nn.Parameter:
        """The rows that learn, (n, D)."""
        return self.get_parameter(ADDED)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embeddings (B, L, D) of tokens (B, L)."""
        places = tokens - self.first
        new = (places >= 0) & (places < len(self.rows))
        old = nn.functional.embedding(tokens.where(~new, 0), self.weight)
        return torch.where(new[..., None], nn.functional.embedding(places.where(new, 0), self.rows), old)

    def plain(self) -> nn.Embedding:
        """One table of all rows, as other programs expect it."""
        after = self.weight[self.first + len(self.rows) :]
        whole = torch.cat([self.weight[: self.first], self.rows, after]).detach()
        return nn.Embedding.from_pretrained(whole)  # type: ignore[no-untyped-call]


class Word:
    """The rare word of a prompt as ``num_vectors`` new tokens: ``sks``, ``sks_1``, ``sks_2``, …, as diffusers has them.

    Prompts stay as they are typed: whoever reads one takes the word for all its tokens.

    Args:
        family: of one text encoder.
        instance_prompt, class_prompt: the word is what the first has and the second lacks.
        placeholder_token: the word, where the prompts differ in several.
        initializer_token: the word of one token whose embedding all vectors begin as; None: the class prompt's last.
        num_vectors: how many embeddings it has.

    Raises:
        UserError: no such word, or one that the tokenizer knows as a token already; an initializer of several tokens.
    """

    def __init__(
        self,
        family: Family,
        instance_prompt: str,
        class_prompt: str | None,
        placeholder_token: str | None = None,
        initializer_token: str | None = None,
        num_vectors: int = 1,
    ) -> None:
        encoders = [name for name in family.networks if name.startswith(TEXT)]
        if encoders != [TEXT]:
            raise UserError(
                f"{family.source} has {len(encoders)} text encoders, a new word takes one: model/tuning=lora"
            )
        self.family, self.name = family, placeholder_token or identifier_of(instance_prompt, class_prompt)
        if self.name not in instance_prompt:
            raise UserError(
                f"model.tuning.placeholder_token={self.name}: model.data.instance_prompt '{instance_prompt}' "
                "does not have it; type a word of it"
            )
        self.tokens = [self.name, *(f"{self.name}_{number}" for number in range(1, num_vectors))]
        known = family.tokenizer.get_vocab()
        if taken := [token for token in self.tokens if token in known]:
            raise UserError(
                f"model.data.instance_prompt: the tokenizer has '{taken[0]}' as a token already, so it cannot be a new "
                f"one; type another word, such as sks or <{self.name}>"
            )
        self.initial = single_token(family.tokenizer, initializer_token, class_prompt or "")
        self.source = family.tokenizer
        self.tokenizer: Any = copy.deepcopy(family.tokenizer)
        self.tokenizer.add_tokens(self.tokens)

    @property
    def encoder(self) -> Any:
        """The text encoder."""
        return self.family.networks[TEXT]

    def attach(self) -> None:
        """Teach the tokenizer and the text encoder the word, which begins as the initializer."""
        table, first = self.encoder.get_input_embeddings(), self.tokenizer.convert_tokens_to_ids(self.tokens[0])
        rows = table.weight.detach()[[self.initial] * len(self.tokens)].clone()
        self.encoder.set_input_embeddings(Table(table, first, rows))
        self.family.tokenizer = self.tokenizer

    @contextmanager
    def forgotten(self) -> Iterator[None]:
        """Within, prompts are read as the source reads them."""
        self.family.tokenizer = self.source
        try:
            yield
        finally:
            self.family.tokenizer = self.tokenizer

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Within, the text encoder has one plain table. Nested, it does nothing."""
        table, config = self.encoder.get_input_embeddings(), self.encoder.config
        if not isinstance(table, Table):
            yield
            return
        size, plain = config.vocab_size, table.plain()
        self.encoder.set_input_embeddings(plain)
        config.vocab_size = plain.num_embeddings
        try:
            yield
        finally:
            self.encoder.set_input_embeddings(table)
            config.vocab_size = size

    def save(self, folder: Path) -> None:
        """Write learned_embeds.safetensors, the word and its embeddings (n, D), as load_textual_inversion takes it."""
        table: Table = self.encoder.get_input_embeddings()
        folder.mkdir(parents=True, exist_ok=True)
        save_file({self.name: table.rows.detach().cpu().contiguous()}, folder / FILE, {"format": "pt"})


def single_token(tokenizer: Any, word: str | None, class_prompt: str) -> int:
    """The token of a word, by default of the last one of the class prompt; UserError when it has several."""
    word = word or class_prompt.split(" ")[-1].strip(MARKS)
    tokens = tokenizer(word, add_special_tokens=False).input_ids
    if len(tokens) != 1:
        raise UserError(
            f"model.tuning.initializer_token: '{word}' is {len(tokens)} tokens to the tokenizer; type a common word "
            "that is one, such as model.tuning.initializer_token=dog"
        )
    return int(tokens[0])
