"""What a text encoder does not read of a prompt: the end of one that is longer than its window."""

import logging
from collections.abc import Iterable
from functools import cache, lru_cache
from typing import Any

from dreambooth.families.folder import quiet

log = logging.getLogger(__name__)
OTHERS = "was truncated because"  # how diffusers' pipelines say it, for every batch


@lru_cache(maxsize=4096)
def lost_end(tokenizer: Any, window: int, prompt: str) -> str:
    """The text of the tokens of ``prompt`` that do not fit into ``window`` beside its marks; "" if all do."""
    with quiet():  # transformers calls the length an error of indexing
        tokens = tokenizer(prompt, add_special_tokens=False).input_ids
    room = window - tokenizer.num_special_tokens_to_add()
    return tokenizer.decode(tokens[room:]).strip() if len(tokens) > room else ""


def warn_of_truncation(tokenizer: Any, window: int, prompts: Iterable[str]) -> None:
    """Say once of each prompt that is too long which of its words are not read."""
    for prompt in dict.fromkeys(prompts):
        if lost := lost_end(tokenizer, window, prompt):
            _say(prompt, lost, window)


@cache
def _say(prompt: str, lost: str, window: int) -> None:
    log.warning("The model reads %d tokens of a prompt; not read: '%s', the end of '%s'", window, lost, prompt)


def warn_of_pipeline_truncation(pipeline: Any, prompts: Iterable[str]) -> None:
    """As ``warn_of_truncation``, for all tokenizers of a diffusers pipeline, whose own word on it is dropped."""
    prompts = list(prompts)
    for name, part in pipeline.components.items():
        if name.startswith("tokenizer") and part is not None:
            warn_of_truncation(part, part.model_max_length, prompts)
    logging.getLogger(type(pipeline).__module__).addFilter(_not_of_truncation)


def _not_of_truncation(record: logging.LogRecord) -> bool:
    return OTHERS not in record.getMessage()
