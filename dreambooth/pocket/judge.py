"""The independent classifier that says which class, colour and context a picture shows.

It is trained on the world's own drawings and on nothing that a generative model made, and shares no weight with the
image-text model, so it may judge them both.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreambooth.pocket.scenes import HUES, NOUNS, PLACES, Scenes, to_float
from dreambooth.pocket.stage import Stage

SIZES = (len(NOUNS), len(HUES), len(PLACES))


def build() -> nn.Sequential:
    """A small convolutional network: (B, 3, 64, 64) in [-1, 1] to the logits of the three questions, side by side."""

    def block(channels_in: int, channels: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        return [conv, nn.GroupNorm(8, channels), nn.ReLU()]

    layers = [*block(3, 24, 2), *block(24, 48, 2), *block(48, 96, 1), *block(96, 96, 2), *block(96, 128, 2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(128 * 16, sum(SIZES)))


class JudgeStage(Stage):
    """Cross-entropy per question; noise and a blur in half the batch, so that fine texture is no clue."""

    def __init__(self, scenes: Scenes, steps: int, seed: int, lr: float = 2e-3, batch: int = 64):
        super().__init__("judge", steps, lr, seed, weight_decay=0.05)
        self.model = build()
        self.scenes, self.batch = scenes, batch

    def loss(self, g: torch.Generator) -> Tensor:
        index = torch.randint(len(self.scenes), (self.batch,), generator=g)
        pixels = to_float(self.scenes.pixels[index])
        half = self.batch // 2
        pixels[:half] = F.avg_pool2d(pixels[:half], 3, 1, 1, count_include_pad=False)
        pixels = pixels + 0.06 * torch.randn(pixels.shape, generator=g)
        labels = self.scenes.labels[index].to(self.device)
        parts = self.model(pixels.to(self.device)).split(SIZES, dim=1)
        losses = (F.cross_entropy(part, labels[:, i], ignore_index=-1) for i, part in enumerate(parts))
        return sum(losses, start=torch.zeros((), device=self.device))


@torch.no_grad()
def verdicts(model: nn.Module, pixels: Tensor, batch: int = 250) -> Tensor:
    """(N, 3) class, colour and context numbers that the judge sees in float pixels (N, 3, 64, 64)."""
    logits = torch.cat([model(part) for part in pixels.split(batch)])
    return torch.stack([part.argmax(1) for part in logits.split(SIZES, dim=1)], dim=1)


def shares(seen: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of right answers to each question, over the pictures where it has an answer."""
    known = labels >= 0
    right = ((seen == labels) & known).sum(0) / known.sum(0)
    return dict(zip(("class", "colour", "context"), right.tolist(), strict=True))
