"""All scores of a card over one set of pictures: a row a picture, and their means."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from dreambooth.metrics.intervals import interval, mean
from dreambooth.metrics.pictures import Pictures
from dreambooth.metrics.scores import Score

Row = dict[str, Any]


class Suite:
    """Scores with their encoders, which are loaded here; a score whose encoder is null is left out (its values None).

    Args:
        encoders: by name: what a score's ``encoder`` refers to.
        scores: in the order of the table.
        text: the CLIP-T prompt: "class" leaves the rare word out ("a photo of a dog on the beach"), "identifier"
            keeps it.
        average: the order of averaging: "pictures" counts every picture once; "prompts" takes the mean of each
            prompt's pictures first, then counts every prompt once. A photograph has no prompt and counts once.
    """

    def __init__(
        self, encoders: dict[str, Any], scores: Sequence[Score], text: str = "class", average: str = "pictures"
    ) -> None:
        self.encoders = {name: encoder for name, encoder in encoders.items() if encoder is not None}
        self.scores, self.text, self.average = list(scores), text, average
        self.names = [score.name for score in self.scores]

    def move(self, device: torch.device) -> None:
        """Move all encoders to ``device``."""
        for encoder in self.encoders.values():
            encoder.model.to(device)

    def rows(self, role: str, drawn: Pictures, photos: Pictures) -> list[Row]:
        """A row a picture of ``role`` ("subject" or "class"): every score, None where it has no meaning."""
        table = self._empty(drawn)
        for score in self._of(role) if len(drawn) else ():
            if score.needs_photos and not len(photos):
                continue
            encoder = self.encoders[score.encoder]
            _fill(table, score.name, score.generated(encoder, drawn, photos).tolist())
            _fill(table, "nearest", score.nearest(encoder, drawn, photos) or [row["nearest"] for row in table])
        return table

    def real_rows(self, photos: Pictures) -> list[Row]:
        """A row a photograph, against the others."""
        table = self._empty(photos)
        for score in self._of("subject") if len(photos) else ():
            _fill(table, score.name, score.real(self.encoders[score.encoder], photos).tolist())
        return table

    def unheard(self, photos: Pictures, texts: Sequence[str]) -> list[float]:
        """CLIP-T of every photograph with every text; empty without a score for prompts or its encoder."""
        scores = self._of("subject") if len(photos) else ()
        found = (score.unheard(self.encoders[score.encoder], photos, texts) for score in scores)
        return next((values for values in found if values), [])

    def summary(self, rows: Sequence[Row]) -> dict[str, float | None]:
        """The mean of each score over the rows where it is defined, in the order that ``average`` says."""
        return {name: mean(self._counted(rows, name)) for name in self.names}

    def intervals(self, rows: Sequence[Row]) -> dict[str, list[float] | None]:
        """The 95 % bootstrap interval of each mean: over pictures, or over prompts, as ``average`` says."""
        return {name: interval(self._counted(rows, name)) for name in self.names}

    def _counted(self, rows: Sequence[Row], name: str) -> list[float | None]:
        """The values of a score that count once each: those of pictures, or the means of prompts."""
        if self.average == "pictures":
            return [row[name] for row in rows]
        groups: dict[Any, list[float | None]] = {}
        for place, row in enumerate(rows):
            asked = row.get("prompt")
            group = place if asked is None else (row.get("subject"), row.get("role"), asked)
            groups.setdefault(group, []).append(row[name])
        return [mean(values) for values in groups.values()]

    def _empty(self, pictures: Pictures) -> list[Row]:
        return [dict.fromkeys([*self.names, "nearest"]) for _ in pictures.images]

    def _of(self, role: str) -> Iterable[Score]:
        return (score for score in self.scores if score.role == role and score.encoder in self.encoders)


def _fill(table: list[Row], name: str, values: Sequence[float | None]) -> None:
    for row, value in zip(table, values, strict=True):
        row[name] = value if value == value else None  # JSON has no NaN
