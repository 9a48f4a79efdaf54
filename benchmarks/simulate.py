"""Stable Diffusion 1.5's UNet built, cut as ``strategy=fsdp`` cuts it and stepped as one of many absent ranks.

    python -m benchmarks.simulate 8 64 512

Tensors have shapes and no values, and the other ranks answer at once (torch's fake process group), so this tells what
one rank would hold, not how fast it is. The last column compares what it holds with ``benchmarks.cost``.
"""

import argparse
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.cost import cost, size_of
from dreambooth.parallel.fsdp import shard


@dataclass(frozen=True)
class Held:
    """What the first of the ranks holds after a step, and what the formula says, in bytes; and how long it took."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    formula: float
    seconds: float

    @property
    def total(self) -> int:
        """All that stays."""
        return self.weights + self.gradients + self.optimizer


def simulate(ranks: int, shape: tuple[int, ...] | None = None, **config: Any) -> Held:
    """One step of ``UNet2DConditionModel(**config)`` as the first of ``ranks``, on a mesh of that ``shape``.

    A mesh of two dimensions replicates over the first one and shards over the second (hybrid sharding).
    """
    start = time.perf_counter()
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        shape = shape or (ranks,)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        with FakeTensorMode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = UNet2DConditionModel(**config)
            learned = size_of(network)
            shard(network, mesh=mesh)
            optimizer = torch.optim.AdamW(network.parameters())
            side, width = 8 * 2 ** (len(network.config.block_out_channels) - 1), network.config.cross_attention_dim
            pictures, prompts = torch.randn(1, 4, side, side), torch.randn(1, 77, width)
            network(pictures, torch.tensor([1]), prompts).sample.square().mean().backward()
            optimizer.step()
            weights = list(network.parameters())
            assert all(isinstance(weight, DTensor) for weight in weights)
            moments = [value for state in optimizer.state.values() for value in state.values()]
            expected = cost("fsdp", learned, 0, shape[-1]).held
            parts = [held(weights), held([weight.grad for weight in weights]), held(moments)]
        return Held(learned, *parts, expected, time.perf_counter() - start)
    finally:
        dist.destroy_process_group()


def held(tensors: list[Any]) -> int:
    """The bytes of this rank's parts of tensors."""
    return sum(tensor.to_local().nbytes for tensor in tensors if isinstance(tensor, DTensor))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ranks", type=int, nargs="+")
    print("| ranks | MiB held by the first | formula | | seconds |\n|---|---|---|---|---|")
    for number in parser.parse_args().ranks:
        found = simulate(number, cross_attention_dim=768)
        total, formula = found.total / 2**20, found.formula / 2**20
        print(f"| {number} | {total:.1f} | {formula:.1f} | {total / formula - 1:+.1%} | {found.seconds:.0f} |")
