"""Gate (b): the small ViT that tells individuals apart, the pocket's stand-in for DINO.

It learns without labels or words: two drawings of one random individual, in two places and poses, are a pair, every
other drawing in the batch is not (SimCLR's loss, arXiv 2002.05709, the other place being the augmentation).
"""

from random import Random

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from dreambooth.noise import seed_of
from dreambooth.pocket import ready
from dreambooth.pocket.autoencoder import reconstruct
from dreambooth.pocket.backgrounds import CONTEXTS
from dreambooth.pocket.figures import CLASSES
from dreambooth.pocket.scenes import PLACES, tensor_of, to_float
from dreambooth.pocket.stage import Stage
from dreambooth.pocket.world import draw, place, random_figure
from dreambooth.progress import progress_bar

TEMPERATURE = 0.1


def build() -> VisionTransformer:
    """8x8 patches of 64x64 pixels in [-1, 1] to a feature of 128 numbers (the class token)."""
    return VisionTransformer(img_size=64, patch_size=8, embed_dim=128, depth=4, num_heads=4, num_classes=0)


def individuals(count: int, views: int, seed: int | str) -> Tensor:
    """(N, views, 3, 64, 64) uint8: random individuals, each in several places. Row i is of class i % 8."""
    rows = []
    nouns = tuple(CLASSES)
    with progress_bar(count, "drawing individuals", "individual") as bar:
        for i in range(count):
            rng = Random(seed_of(seed, i, "individual"))
            figure = random_figure(rng, noun=nouns[i % len(nouns)])
            places = [rng.choice(tuple(CONTEXTS)) for _ in range(views)]
            scenes = [place(figure, where, rng.randrange(1 << 31)) for where in places]
            rows.append(torch.stack([tensor_of(draw(scene)) for scene in scenes]))
            bar.update()
    return torch.stack(rows)


class EyeStage(Stage):
    """Half the batches are of one class, so that shape alone never tells two apart."""

    def __init__(self, views: Tensor, steps: int, seed: int, lr: float = 1e-3, batch: int = 40):
        super().__init__("eye", steps, lr, seed, weight_decay=0.05)
        self.model = build()
        self.views, self.batch = views, batch

    def loss(self, g: torch.Generator) -> Tensor:
        classes = len(CLASSES)
        index = torch.randperm(len(self.views) // classes, generator=g)[: self.batch] * classes
        if torch.rand((), generator=g) < 0.5:
            index = index + torch.randint(classes, (), generator=g)
        else:
            index = index + torch.randint(classes, (len(index),), generator=g)
        pair = torch.stack([torch.randperm(self.views.shape[1], generator=g)[:2] for _ in index])
        pixels = to_float(torch.cat([self.views[index, pair[:, 0]], self.views[index, pair[:, 1]]])).to(self.device)
        features = F.normalize(self.model(pixels), dim=-1)
        logits = features @ features.T / TEMPERATURE
        logits.fill_diagonal_(-torch.inf)
        partner = torch.arange(2 * len(index), device=self.device).roll(len(index))
        return F.cross_entropy(logits, partner)


@torch.no_grad()
def features(model: VisionTransformer, pixels: Tensor, batch: int = 250) -> Tensor:
    """(N, 128) unit features of float pixels (N, 3, 64, 64) in [-1, 1]."""
    return torch.cat([F.normalize(model(part), dim=-1) for part in pixels.split(batch)])


@torch.no_grad()
def triplet_accuracy(model: VisionTransformer, views: Tensor) -> float:
    """Share of (a, b of one individual; c of another of its class) where a is closer to b than to c."""
    n, v = views.shape[:2]
    f = features(model, to_float(views.flatten(0, 1))).view(n, v, -1)
    right = total = 0
    for i in range(n):
        others = f[i % len(CLASSES) :: len(CLASSES)]
        keep = torch.arange(len(others)) != i // len(CLASSES)
        same = (f[i] @ f[i].T)[~torch.eye(v, dtype=torch.bool)].view(v, v - 1)
        different = f[i] @ others[keep].flatten(0, 1).T
        right += int((same[:, :, None] > different[:, None, :]).sum())
        total += same.numel() * different.shape[1]
    return right / total


def subject_triplets(model: VisionTransformer) -> float:
    """As ``triplet_accuracy``, of each ready subject's photographs against 100 random individuals of its class."""
    right = []
    for name, figure in ready.SUBJECTS.items():
        own = _photographs(model, name)
        rng = Random(seed_of(name, "strangers"))
        scenes = [place(random_figure(rng, figure.noun), rng.choice(PLACES), i) for i in range(100)]
        others = features(model, to_float(torch.stack([tensor_of(draw(scene)) for scene in scenes])))
        right += _nearer(own, own, others)
    return torch.stack(right).mean().item()


def marks_survive(model: VisionTransformer, vae: AutoencoderKL) -> float:
    """Share of (a, b, c) where the reconstruction of a is closer to b than to c.

    a and b are two photographs of a ready subject, c one of another ready subject of its class.
    """
    nouns = {name: figure.noun for name, figure in ready.SUBJECTS.items()}
    right = []
    for name, other in ((one, two) for one in nouns for two in nouns if one != two and nouns[one] == nouns[two]):
        right += _nearer(_photographs(model, name, vae), _photographs(model, name), _photographs(model, other))
    return torch.stack(right).mean().item()


def _photographs(model: VisionTransformer, name: str, vae: AutoencoderKL | None = None) -> Tensor:
    """Features of a ready subject's photographs, as they are or as an autoencoder gives them back."""
    pixels = to_float(torch.stack([tensor_of(picture) for picture in ready.photographs(name)]))
    return features(model, pixels if vae is None else reconstruct(vae, pixels))


def _nearer(seen: Tensor, own: Tensor, others: Tensor) -> list[Tensor]:
    """For each row of ``seen``, how often it is closer to another photograph of its own than to one of the others."""
    same, different = seen @ own.T, seen @ others.T
    elsewhere = ~torch.eye(len(own), dtype=torch.bool)  # not the photograph that it is of
    return [(same[i][elsewhere[i]][:, None] > different[i][None]).float().mean() for i in range(len(own))]
