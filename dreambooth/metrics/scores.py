"""The scores: what one number says of a picture, and what photographs say of each other.

A score is a class with a ``name``, the ``encoder`` it needs, the ``role`` of the pictures that it judges ("subject" or
"class"), and two methods. A new one is a class here and a line in conf/metrics/.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dreambooth.metrics.pictures import Pictures

NAN = float("nan")


class Score(ABC):
    """One value a picture; NaN where it has no meaning."""

    name: str
    encoder: str
    role = "subject"
    needs_photos = True

    @abstractmethod
    def generated(self, encoder: Any, drawn: Pictures, photos: Pictures) -> Tensor:
        """(N,) of the N drawn pictures of the role."""

    def real(self, encoder: Any, photos: Pictures) -> Tensor:
        """(M,) of the photographs against each other, never against themselves: the ceiling. NaN where undefined."""
        return torch.full((len(photos),), NAN)

    def nearest(self, encoder: Any, drawn: Pictures, photos: Pictures) -> list[int] | None:
        """Which photograph each drawn picture is nearest to, if the score looks for that."""
        return None

    def unheard(self, encoder: Any, photos: Pictures, texts: Sequence[str]) -> list[float]:
        """What prompts score with photographs that show the subject whatever they say, if the score is of prompts."""
        return []


class Fidelity(Score):
    """Mean cosine similarity of a generated picture's features and those of every real photograph."""

    def generated(self, encoder: Any, drawn: Pictures, photos: Pictures) -> Tensor:
        return (drawn.seen_by(encoder) @ photos.seen_by(encoder).T).mean(1)

    def real(self, encoder: Any, photos: Pictures) -> Tensor:
        features = photos.seen_by(encoder)
        return _others(features @ features.T).mean(1)  # the mean of nothing is NaN: one photograph has no ceiling


class Dino(Fidelity):
    """DINO, subject fidelity: mean cosine of ViT-S/16 DINO features, generated against real.

    The paper's preferred measure, as it is not trained to overlook what tells two of a class apart.
    Source: arXiv 2208.12242, section 4.1.
    """

    name, encoder = "dino", "dino"


class ClipI(Fidelity):
    """CLIP-I, subject fidelity: mean cosine of CLIP image features, generated against real (section 4.1)."""

    name, encoder = "clip_i", "clip"


class ClipT(Score):
    """CLIP-T, prompt fidelity: cosine of the CLIP features of a picture and of its prompt (section 4.1).

    The paper does not say whether the prompt has the rare word; ``metrics.text`` decides.
    """

    name, encoder, needs_photos = "clip_t", "clip", False

    def generated(self, encoder: Any, drawn: Pictures, photos: Pictures) -> Tensor:
        texts = list(dict.fromkeys(drawn.texts))
        rows = torch.tensor([texts.index(text) for text in drawn.texts], dtype=torch.long)
        return (drawn.seen_by(encoder) * encoder.texts(texts)[rows]).sum(1)

    def unheard(self, encoder: Any, photos: Pictures, texts: Sequence[str]) -> list[float]:
        """Of every photograph with every text: what a model scores that shows the subject whatever it is asked for."""
        table: list[float] = (photos.seen_by(encoder) @ encoder.texts(list(texts)).T).flatten().tolist()
        return table


class Pres(Fidelity):
    """PRES, class drift: the DINO similarity of pictures of the *class* to photographs of the subject.

    High when the class has become the subject. Source: section 4.3, Table 3.
    """

    name, encoder, role = "pres", "dino", "class"

    real = Score.real  # photographs of the subject say nothing of its class


class Div(Score):
    """DIV, diversity: mean LPIPS distance of a picture to the others of the same prompt (section 4.3, Table 3).

    Per prompt this averages to the mean over its pairs. NaN for a prompt with a single picture.
    """

    name, encoder, needs_photos = "div", "lpips", False

    def generated(self, encoder: Any, drawn: Pictures, photos: Pictures) -> Tensor:
        values = torch.full((len(drawn),), NAN)
        for positions in drawn.of_each_prompt():
            values[positions] = _others(encoder.distances([drawn.images[i] for i in positions])).mean(1)
        return values

    def real(self, encoder: Any, photos: Pictures) -> Tensor:
        return _others(encoder.distances(photos.images)).mean(1)


class Copy(Score):
    """Cosine of CLIP image features to the *nearest* photograph, background included.

    Fidelity by copying is no fidelity: above what photographs have among themselves, a picture repeats one of them.
    (CLIP sees the background, which DINO is here to overlook.)
    """

    name, encoder = "copy", "clip"

    def generated(self, encoder: Any, drawn: Pictures, photos: Pictures) -> Tensor:
        return (drawn.seen_by(encoder) @ photos.seen_by(encoder).T).max(1).values

    def nearest(self, encoder: Any, drawn: Pictures, photos: Pictures) -> list[int]:
        """Which photograph is nearest to each picture."""
        return (drawn.seen_by(encoder) @ photos.seen_by(encoder).T).argmax(1).tolist()

    def real(self, encoder: Any, photos: Pictures) -> Tensor:
        features = photos.seen_by(encoder)
        others = _others(features @ features.T)
        return others.max(1).values if others.numel() else torch.full((len(photos),), NAN)


def _others(table: Tensor) -> Tensor:
    """A square table (N, N) without its diagonal, (N, N - 1)."""
    count = len(table)
    return table[~torch.eye(count, dtype=torch.bool)].view(count, max(count - 1, 0))
