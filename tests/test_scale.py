"""What strategies cost: the formulas among themselves, against real traffic, and against ranks that are not there."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import pytorch_lightning as pl
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from benchmarks.cost import STRATEGIES, cost, memory_table, sizes, traffic_table
from benchmarks.simulate import simulate
from benchmarks.traffic import expected, measure
from dreambooth import compose
from dreambooth.config import build
from tests.test_tensors import rank_of

TINY = {"block_out_channels": (32, 64), "cross_attention_dim": 16, "attention_head_dim": 4} | {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def test_one_rank_sends_nothing_and_many_hold_a_share() -> None:
    for name in STRATEGIES:
        assert cost(name, 100, 10, 1).sent == 0
        assert cost(name, 100, 10, 64).held <= cost(name, 100, 10, 2).held
    ddp, fsdp, one, two, three = (cost(name, 10**6, 0, 1000) for name in STRATEGIES)
    assert fsdp.sent == pytest.approx(1.5 * ddp.sent)  # ZeRO, section 7.2.2
    assert one.sent == two.sent == pytest.approx(ddp.sent)
    assert three.sent == pytest.approx(1.5 * two.sent)
    assert fsdp.held < three.held < two.held < one.held < ddp.held


def test_the_networks_are_those_that_were_published() -> None:
    assert sizes("SD 1.5")[0] == 859_520_964
    assert sizes("SDXL")[0] == 2_567_463_684
    assert sizes("SD3 medium")[0] == 2_028_328_000
    assert sizes("FLUX")[0] == 11_901_408_320


@pytest.mark.parametrize("table", [memory_table, traffic_table])
def test_the_tables_of_the_documentation_are_those_that_are_printed(table: Callable[[], Iterator[str]]) -> None:
    documented = (Path(__file__).parents[1] / "docs" / "scale.md").read_text()
    assert "\n\n" + "\n".join(table()) + "\n\n" in documented


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [pytest.param((8,), id="sharded"), pytest.param((4, 8), id="hybrid", marks=pytest.mark.exhaustive)]
)
def test_a_small_unet_steps_on_ranks_that_are_not_there(shape: tuple[int, ...]) -> None:
    ranks = shape[0] if len(shape) == 1 else shape[0] * shape[1]
    found = simulate(ranks, shape, **TINY)
    assert found.gradients == found.weights
    assert found.optimizer == pytest.approx(2 * found.weights, rel=0.01)
    assert found.total == pytest.approx(found.formula, rel=0.05)


@pytest.mark.parametrize("rank", range(4))
def test_the_hybrid_card_shards_within_a_node(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes of two ranks, as torchrun starts them, of which one is there."""
    place = {"RANK": rank, "LOCAL_RANK": rank % 2, "GROUP_RANK": rank // 2, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}
    for name, value in ({"TORCHELASTIC_RUN_ID": "7", "MASTER_ADDR": "here", "MASTER_PORT": "1"} | place).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # which Lightning sets, for the whole process
    strategy = build(compose(["strategy=fsdp_hybrid"]).trainer.strategy)
    trainer = pl.Trainer(accelerator="cpu", devices=2, num_nodes=2, strategy=strategy, logger=False)
    with rank_of(rank, 4):
        strategy.setup_environment()
        mesh = strategy.device_mesh
        assert mesh.mesh_dim_names == ("replicate", "shard")
        assert mesh.mesh.tolist() == [[0, 1], [2, 3]]
        assert mesh["shard"].mesh.tolist() == [[0, 1], [2, 3]][rank // 2]
    assert trainer.world_size == 4


@pytest.mark.exhaustive
@pytest.mark.parametrize(("ranks", "uneven"), [(8, 0.01), (64, 0.01), (512, 0.8)])
def test_stable_diffusion_steps_on_ranks_that_are_not_there(ranks: int, uneven: float) -> None:
    found = simulate(ranks, cross_attention_dim=768)
    assert found.parameters == 859_520_964
    assert found.formula <= found.total <= (1 + uneven) * found.formula


@pytest.mark.exhaustive
@pytest.mark.skipif(
    bool(os.getuid()) or not shutil.which("ip") or subprocess.run(["unshare", "--net", "true"], check=False).returncode,
    reason="needs root, iproute2 and the right to make a network",
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_send_what_the_formula_says(strategy: str) -> None:
    if strategy.startswith("deepspeed"):
        pytest.importorskip("deepspeed", reason="needs deepspeed")
    assert measure(strategy) == pytest.approx(expected(strategy), rel=0.05)
