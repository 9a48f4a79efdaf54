"""Randomness as a function of (seed, step, index, purpose).

``index`` is a position in the global batch. Rank, world size and accumulation only decide which indices a process
holds, so a resumed run equals an unbroken one and two ranks of batch 1 draw what one rank of batch 2 draws.
"""

import hashlib

import torch
from torch import Tensor


def seed_of(*keys: int | str) -> int:
    """A 63-bit seed that depends on every key and on their order."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*keys: int | str) -> torch.Generator:
    """A CPU generator for one purpose, for example ``generator(seed, step, index, "noise")``."""
    return torch.Generator().manual_seed(seed_of(*keys))


def gaussian(shape: tuple[int, ...], seed: int, step: int, indices: list[int], purpose: str) -> Tensor:
    """Standard normal noise (B, *shape), row k drawn for position ``indices[k]`` of the global batch."""
    return torch.stack([torch.randn(shape, generator=generator(seed, step, index, purpose)) for index in indices])


def stratified(count: int, seed: int, step: int, purpose: str) -> Tensor:
    """``count`` uniform numbers in [0, 1), one from each of ``count`` equal strata, in random order.

    The permutation matters: in order, the first role of a batch would only ever see the low strata.
    """
    g = generator(seed, step, purpose)
    strata = torch.randperm(count, generator=g) + torch.rand(count, generator=g)
    return strata / count
