"""Fully sharded data parallel: weights, gradients and moments are cut over the ranks, block by block."""

from typing import Any

import torch
from omegaconf import DictConfig
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from dreambooth.devices import devices_of
from dreambooth.errors import UserError
from dreambooth.parallel.checks import check_sharding
from dreambooth.parallel.layout import Sharded


class FsdpLayout(Sharded):
    """Every parameter is a DTensor."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        strategy = module.trainer.strategy
        half = strategy.precision_plugin.precision == "bf16-mixed"
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if half else None
        for network in module.learned.values():
            shard(network, mesh=strategy.device_mesh, **({"mp_policy": policy} if policy else {}))


class FsdpStrategy(ModelParallelStrategy):
    """FSDP2 (``torch.distributed.fsdp.fully_shard``) over all ranks.

    Args:
        replicate: groups of ranks that each hold all weights together; the ranks within a group share them out, and
            the groups exchange gradients only. Null: one group for each node, so that weights travel within nodes.
    """

    layout = FsdpLayout

    def __init__(self, replicate: int | None = 1) -> None:
        super().__init__()
        self.replicate = replicate

    @staticmethod
    def check(cfg: DictConfig) -> None:
        """Raise UserError for settings that it has no answer to, and for ranks that make no equal groups."""
        check_sharding(cfg, "strategy=fsdp")
        trainer = cfg.trainer
        groups, ranks = trainer.strategy.get("replicate"), trainer.num_nodes * devices_of(trainer)
        if groups is not None and ranks % groups:
            raise UserError(
                f"trainer.strategy.replicate={groups}: {ranks} ranks cannot be cut into {groups} equal groups; type "
                f"what divides {ranks}, or trainer.strategy.replicate=null for a group on each node"
            )

    def setup_environment(self) -> None:
        self._setup_distributed()
        groups = self.num_nodes if self.replicate is None else self.replicate
        shape, names = (self.world_size,), ("shard",)
        if groups > 1:
            shape, names = (groups, self.world_size // groups), ("replicate", "shard")  # type: ignore[assignment]
        self._device_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)


def shard(network: nn.Module, **options: Any) -> None:
    """Cut a network where its authors say that it must not be cut any finer, then as a whole."""
    blocks = set(getattr(network, "_no_split_modules", None) or ())
    for module in reversed(list(network.modules())):  # those within first
        if type(module).__name__ in blocks and module is not network:
            fully_shard(module, **options)
    fully_shard(network, **options)
