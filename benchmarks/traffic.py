"""Counts the bytes that two ranks send each other in a step, and compares them with ``benchmarks.cost``.

    python -m benchmarks.traffic            # as root: the ranks have a network of their own, where nobody else sends

The ranks are processes over gloo on the loopback device, whose counter in /proc/net/dev counts each byte once. Gloo has
no reduce-scatter: torch makes one of an all-reduce there, which sends twice as much. Ends with 1 if any count is more
than 5 % off.
"""

import contextlib
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.cost import cost, size_of

WIDTH, LAYERS, STEPS, TOLERANCE = 1024, 6, 4, 0.05
STRATEGIES = ("ddp", "fsdp", "deepspeed_1", "deepspeed_2", "deepspeed_3")


def network() -> nn.Sequential:
    """6.3 million parameters in equal layers."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))


def counted() -> int:
    """Bytes that the loopback device has sent."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if "lo:" in line)
    return int(line.split(":")[1].split()[8])


def stepper(strategy: str) -> Any:
    """A function that makes one training step."""
    model: Any = network()
    if strategy.startswith("deepspeed"):
        return deepspeed_stepper(model, int(strategy[-1]))
    if strategy == "ddp":
        model = DistributedDataParallel(model)
    else:
        for module in [*model, model]:
            fully_shard(module)
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        model(torch.ones(2, WIDTH)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def deepspeed_stepper(model: nn.Module, stage: int) -> Any:
    """The same by DeepSpeed, whose own operations would have to be compiled first."""
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
    zero = {"stage": stage}
    if stage == 3:  # a network this small would otherwise stay whole from its forward pass to its backward pass
        keep = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
        zero |= {f"stage3_{name}": 0 for name in keep}
    config = {"train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True, "zero_optimization": zero}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config, dist_init_required=False
    )

    def step() -> None:
        engine.backward(engine(torch.ones(2, WIDTH)).square().mean())
        engine.step()

    return step


def rank(strategy: str) -> None:
    """One of the two ranks; the first one prints the bytes of a step."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    step = stepper(strategy)
    step()  # the first one builds buckets and tells shapes
    dist.barrier()
    before = counted()
    for _ in range(STEPS):
        step()
    dist.barrier()
    if dist.get_rank() == 0:
        print("sent", (counted() - before) / STEPS)
    dist.barrier()
    dist.destroy_process_group()


def measure(strategy: str) -> float:
    """Bytes that both ranks sent in a step, in a network where nobody else sends any."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
    shared |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
    command = f"RANK=1 LOCAL_RANK=1 {sys.executable} -m benchmarks.traffic {strategy} & "
    command += f"RANK=0 LOCAL_RANK=0 {sys.executable} -m benchmarks.traffic {strategy}; wait"
    apart = ["unshare", "--net", "sh", "-c", f"ip link set lo up; {command}"]
    done = subprocess.run(apart, env=shared, capture_output=True, text=True, check=True, timeout=300)
    return float(done.stdout.split("sent ")[1].split()[0])


def expected(strategy: str) -> float:
    """What both ranks should send by the formulas, but with a sum for all where gloo cannot share one out."""
    learned = size_of(network())
    sent = cost(strategy, learned, 0, ranks=2).sent
    return 2 * (sent + (0 if strategy == "ddp" else 2 * learned))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        rank(sys.argv[1])
        sys.exit()
    wrong = False
    print("| | by formula, MB | counted, MB | |\n|---|---|---|---|")
    for name in STRATEGIES:
        formula, found = expected(name), measure(name)
        wrong |= abs(found / formula - 1) > TOLERANCE
        print(f"| {name} | {formula / 1e6:.2f} | {found / 1e6:.2f} | {found / formula - 1:+.1%} |", flush=True)
    sys.exit(wrong)
