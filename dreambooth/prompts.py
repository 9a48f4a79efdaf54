"""What prompts say: the identifier that an instance prompt has and its class prompt lacks, and the words around it."""

import os
import re
from pathlib import Path
from typing import Any

from dreambooth.errors import UserError

MARKS = ".,;:!?'\""


def read_prompts(prompts: Any, key: str = "infer.prompts") -> list[str]:
    """Prompts from one, a list of them, or the name of a text file with one a line; UserError without any."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts or [])
    path = os.path.expanduser(prompts) if isinstance(prompts, str) else ""
    if path.endswith(".txt") or os.path.isfile(path):
        try:  # utf-8-sig: without the mark that some editors begin a file with
            texts = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{key}: {prompts} cannot be read ({error}); type a UTF-8 text file") from None
    if not texts or any(text is None or not str(text).strip() for text in texts):
        raise UserError(f"{key}: there is no prompt, or an empty one; type {key}='a photo of a sks dog'")
    return [str(text) for text in texts]


def phrase(prompt: object) -> str:
    """A prompt without how the picture is made: "a sks dog" of "a photo of a sks dog"."""
    return re.sub(r"^a \w+ of ", "", str(prompt))


def rephrase(prompt: str, old: str, new: str) -> str | None:
    """``prompt`` with ``new`` in the place of ``old``, or with one's phrase for the other's; None: it has neither."""
    for words in (str, phrase):
        if words(old) in prompt:
            return prompt.replace(words(old), words(new))
    return None


def around_identifier(instance_prompt: str, class_prompt: str) -> tuple[str, str]:
    """What stands before and after the identifier: the words of the instance prompt that the class prompt lacks."""
    words, known = instance_prompt.split(), _bare(class_prompt)
    rare = [place for place, word in enumerate(words) if not _bare(word) <= known]
    if not rare:
        raise UserError(
            f"model.data.instance_prompt '{instance_prompt}' has no word that model.data.regularization_prompt "
            f"'{class_prompt}' lacks; type one before the class noun, such as 'a photo of a sks dog'"
        )
    return " ".join(words[: rare[0]]), " ".join(words[rare[-1] + 1 :])


def identifier_of(instance_prompt: str, class_prompt: str | None) -> str:
    """The word that the instance prompt has and the class prompt lacks; UserError when there is none, or several."""
    before, after = around_identifier(instance_prompt, class_prompt or "")
    words = instance_prompt.split()
    rare = words[len(before.split()) : len(words) - len(after.split())]
    if len(rare) > 1:
        raise UserError(
            f"model.data.instance_prompt '{instance_prompt}': which of '{' '.join(rare)}' learns? "
            f"Type the others in model.data.regularization_prompt too, or model.tuning.placeholder_token={rare[0]}"
        )
    return rare[0].strip(MARKS)


def without_identifier(prompt: str, instance_prompt: str, class_prompt: str) -> str:
    """The prompt without the words of the instance prompt that the class prompt lacks."""
    rare = _bare(instance_prompt) - _bare(class_prompt)
    return " ".join(word for word in prompt.split() if not _bare(word) & rare)


def _bare(text: str) -> set[str]:
    """The words of a text, small and without the marks around them."""
    return {word.strip(MARKS) for word in text.lower().split()} - {""}
