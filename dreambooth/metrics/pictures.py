"""Pictures under measurement: each encoder looks at them once."""

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor


class Pictures:
    """``images`` with the ``prompts`` that drew them (one each; empty for photographs).

    ``texts`` is what the text encoder compares them with, when it differs from the prompts.
    """

    def __init__(
        self, images: Sequence[Image.Image], prompts: Sequence[str] = (), texts: Sequence[str] | None = None
    ) -> None:
        self.images, self.prompts = list(images), list(prompts)
        self.texts = self.prompts if texts is None else list(texts)
        self._seen: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.images)

    def seen_by(self, encoder: Any) -> Tensor:
        """Unit features (N, D) of ``encoder``, computed at the first call."""
        if id(encoder) not in self._seen:
            self._seen[id(encoder)] = encoder.images(self.images)
        return self._seen[id(encoder)]

    def of_each_prompt(self) -> list[list[int]]:
        """The positions of the pictures of each distinct prompt, in the order of their first picture."""
        groups: dict[str, list[int]] = {}
        for position, prompt in enumerate(self.prompts):
            groups.setdefault(prompt, []).append(position)
        return list(groups.values())
