"""What a family of networks owes the rest of the program."""

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from dreambooth.files import hash_tensors

ADDED = "added_rows"  # of a table of embeddings, by a tuning


class Family(ABC):
    """Networks in a plain dict, so that a LightningModule registers only those that learn, and what they do together.

    ``vae_scale_factor`` is the number of pixels a latent cell spans, ``source`` what ``model.from_pretrained`` named.
    """

    scheduler: Any  # of diffusers, the checkpoint's own; within module.averaged() that of the objective
    tokenizer: Any  # of transformers, that of the first text encoder
    vae_scale_factor: int
    source: str

    def __init__(self, networks: dict[str, nn.Module]):
        self.networks = networks
        self._fingerprints: dict[str, str] = {}

    @property
    def size_multiple(self) -> int:
        """Pixels that the sides of a picture are multiples of when all networks halve it evenly."""
        return self.vae_scale_factor

    @property
    @abstractmethod
    def default_resolution(self) -> int:
        """Pixels a side of the pictures that the checkpoint was made for."""

    @abstractmethod
    def encode_pictures(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to moments (B, 2C, h, w): mean and log variance, float32."""

    @abstractmethod
    def sample_latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """A sample of the moments (B, 2C, h, w) by ``noise`` (B, C, h, w), in the scale that the denoiser works in."""

    @abstractmethod
    def token_ids(self, prompts: list[str]) -> Tensor:
        """Token ids of the prompts, (B, L). With the text encoder's weights they are the cache key of an embedding."""

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """What ``denoise`` takes of the prompts, (B, ...) each; gradients flow into a text encoder that learns."""

    @abstractmethod
    def denoise(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """The prediction (B, C, h, w) for noisy latents (B, C, h, w) at time steps (B,)."""

    @abstractmethod
    def trainable_networks(self) -> dict[str, nn.Module]:
        """The networks a tuning may touch, by their name in ``networks``."""

    @abstractmethod
    def to_pipeline(self) -> DiffusionPipeline:
        """A diffusers pipeline around the same networks, with a scheduler of its own and no safety checker."""

    @abstractmethod
    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write all networks and the scheduler as a diffusers folder, weights in ``dtype`` (None: as they are)."""

    def fingerprint(self, *names: str, fresh: bool = False) -> str:
        """16 hex digits of the weights of the named networks (all by default).

        As they were at the first call, when they are those of the source; ``fresh``: as they are now.
        """
        digest = hashlib.sha256()
        known = {} if fresh else self._fingerprints
        for name in sorted(names or self.networks):
            if name not in known:
                known[name] = hash_tensors(own_weights(self.networks[name]))
            digest.update(f"{name}={known[name]};".encode())
        return digest.hexdigest()[:16]

    def move(self, device: torch.device | str, *names: str) -> None:
        """Move the named networks (all by default) to ``device``."""
        for name in names or tuple(self.networks):
            self.networks[name].to(device)


def own_weights(network: nn.Module) -> dict[str, Tensor]:
    """A network's weights without adapters and new words, by the names without them (PEFT adds ``base_layer``)."""
    return {
        name.replace(".base_layer.", "."): value
        for name, value in network.state_dict().items()
        if not any(part.startswith(("lora_", ADDED)) for part in name.split("."))
    }


def recompute_activations(network: nn.Module) -> None:
    """Switch on gradient checkpointing, under its name in diffusers, transformers 5 or transformers 4."""
    known: Any = network
    if hasattr(known, "enable_gradient_checkpointing"):
        known.enable_gradient_checkpointing()
    elif hasattr(known, "activation_checkpointing_enable"):
        known.activation_checkpointing_enable()
    else:  # by whose default an adapter behind frozen embeddings would have no gradient
        known.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
