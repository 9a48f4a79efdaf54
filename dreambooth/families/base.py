"""What a family of networks owes the rest of the program."""

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from dreambooth.files import hash_tensors


class Family(ABC):
    """Networks in a plain dict, so that a LightningModule registers only those that learn, and what they do together.

    ``factor`` is the number of pixels a latent cell spans, ``source`` what ``model.from_pretrained`` named.
    """

    scheduler: Any  # of diffusers, the checkpoint's own
    tokenizer: Any  # of transformers, that of the first text encoder
    factor: int
    source: str

    def __init__(self, networks: dict[str, nn.Module]):
        self.networks = networks
        self._fingerprints: dict[str, str] = {}

    @property
    def multiple(self) -> int:
        """Pixels that the sides of a picture are multiples of when all networks halve it evenly."""
        return self.factor

    @property
    @abstractmethod
    def default_resolution(self) -> int:
        """Pixels a side of the pictures that the checkpoint was made for."""

    @abstractmethod
    def encode_pictures(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to moments (B, 2C, h, w): mean and log variance, float32."""

    @abstractmethod
    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """A sample of the moments (B, 2C, h, w) by ``noise`` (B, C, h, w), in the scale that the denoiser works in."""

    @abstractmethod
    def tokens(self, prompts: list[str]) -> Tensor:
        """What the text encoder reads of the prompts, (B, L) integers; with its weights they decide the embeddings."""

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """What ``denoise`` takes of the prompts, (B, ...) each; gradients flow into a text encoder that learns."""

    @abstractmethod
    def denoise(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """The prediction (B, C, h, w) for noisy latents (B, C, h, w) at time steps (B,)."""

    @abstractmethod
    def trainable(self) -> dict[str, nn.Module]:
        """The networks a tuning may touch, by their name in ``networks``."""

    @abstractmethod
    def to_pipeline(self) -> DiffusionPipeline:
        """A diffusers pipeline around the same networks, with a scheduler of its own and no safety checker."""

    @abstractmethod
    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write all networks as a diffusers folder, weights in ``dtype`` (None: as they are). See folder.export."""

    def fingerprint(self, *names: str, fresh: bool = False) -> str:
        """16 hex digits of the weights of the named networks (all by default).

        As they were at the first call, when they are those of the source; ``fresh``: as they are now.
        """
        digest = hashlib.sha256()
        known = {} if fresh else self._fingerprints
        for name in sorted(names or self.networks):
            if name not in known:
                known[name] = hash_tensors(self.networks[name].state_dict())
            digest.update(f"{name}={known[name]};".encode())
        return digest.hexdigest()[:16]

    def move(self, device: torch.device | str, *names: str) -> None:
        """Move the named networks (all by default) to ``device``."""
        for name in names or tuple(self.networks):
            self.networks[name].to(device)
