"""What a strategy costs: the memory of a rank and the bytes that it sends in a step, by formula.

    python -m benchmarks.cost               # the tables of docs/scale.md; benchmarks/traffic.py checks the bytes

AdamW in float32, as here: weights, gradients and two moments, four bytes each; DeepSpeed keeps another copy of the
weights that a rank updates. To sum S bytes over N ranks, a ring has each of them send
2 S (N - 1) / N; to share them out or to gather them, half of it. Sources: ZeRO, arXiv 1910.02054, sections 5 and 7;
FSDP2 is its third stage with float32 shares.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

GIB, GB = 2**30, 10**9
STRATEGIES = ("ddp", "fsdp", "deepspeed_1", "deepspeed_2", "deepspeed_3")
LINKS = {"10 Gb/s": 1.25, "25 Gb/s": 3.125, "100 Gb/s": 12.5, "400 Gb/s": 50.0, "NVLink": 450.0}  # GB/s, one direction

SD15 = {"cross_attention_dim": 768}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3 = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "out_channels": 16,
}
SHAPES = {
    "SD 1.5": (UNet2DConditionModel, SD15),
    "SDXL": (UNet2DConditionModel, SDXL),
    "SD3 medium": (SD3Transformer2DModel, SD3),
    "FLUX": (FluxTransformer2DModel, {"guidance_embeds": True}),
}


@dataclass(frozen=True)
class Cost:
    """What one rank holds and sends, in bytes. ``transient`` is there within a step only: buckets and whole blocks."""

    weights: float
    gradients: float
    optimizer: float
    transient: float
    sent: float

    @property
    def held(self) -> float:
        """All of the memory but for activations."""
        return self.weights + self.gradients + self.optimizer + self.transient


def cost(strategy: str, learned: int, block: int, ranks: int, half: bool = False) -> Cost:
    """The cost of ``learned`` parameters, the largest block of which has ``block``.

    ``half`` is trainer.precision=bf16-mixed, in which fsdp gathers weights. All else is held and sent in float32.
    """
    share, sends = 1 / ranks, (ranks - 1) / ranks
    if strategy == "ddp":
        return Cost(4 * learned, 4 * learned, 8 * learned, 4 * learned, 2 * sends * 4 * learned)
    if strategy == "fsdp":
        # two blocks are whole at once, the next one being fetched, and the gradients of one
        gathered = 2 if half else 4
        transient = 2 * block * gathered + 4 * block
        sent = sends * learned * (2 * gathered + 4)
        return Cost(4 * learned * share, 4 * learned * share, 8 * learned * share, transient, sent)
    stage = int(strategy[-1])
    return Cost(
        4 * learned * (share if stage == 3 else 1) + 4 * learned * share,
        4 * learned * (share if stage >= 2 else 1),
        8 * learned * share,
        2 * 4 * block if stage == 3 else 0,
        4 * learned * sends * (3 if stage == 3 else 2),
    )


def blocks_of(network: nn.Module, names: set[str]) -> list[nn.Module]:
    """The modules of these class names, the innermost first."""
    return [module for module in reversed(list(network.modules())) if type(module).__name__ in names]


def size_of(network: nn.Module) -> int:
    """How many parameters there are."""
    return sum(weight.numel() for weight in network.parameters())


@cache
def sizes(shape: str) -> tuple[int, int]:
    """How many parameters a network has, and its largest block without the blocks within."""
    kind, config = SHAPES[shape]
    with torch.device("meta"):
        network = kind(**config)
    largest, taken, names = 0, set(), set(network._no_split_modules)  # which its authors say are cut no finer
    for module in blocks_of(network, names):
        own = [weight for weight in module.parameters() if id(weight) not in taken]
        taken |= set(map(id, own))
        largest = max(largest, sum(weight.numel() for weight in own))
    return size_of(network), largest


def memory_table(ranks: tuple[int, ...] = (2, 8, 64, 512)) -> Iterator[str]:
    """GiB of a rank without activations, full fine-tuning in bf16-mixed."""
    yield "| " + " | ".join(["", "strategy", *(f"{number} ranks" for number in ranks)]) + " |"
    yield "|---" * (2 + len(ranks)) + "|"
    for shape in SHAPES:
        learned, block = sizes(shape)
        for name in STRATEGIES:
            held = [cost(name, learned, block, number, half=True).held / GIB for number in ranks]
            yield "| " + " | ".join([f"{shape}, {learned / 1e6:.0f} M", name, *(f"{each:.1f}" for each in held)]) + " |"


def traffic_table(ranks: int = 8) -> Iterator[str]:
    """GB that a rank sends in a step, and the seconds that this takes alone."""
    yield "| " + " | ".join(["", "strategy", "GB sent", *LINKS]) + " |"
    yield "|---" * (3 + len(LINKS)) + "|"
    for shape in SHAPES:
        learned, block = sizes(shape)
        for name in ("ddp", "fsdp", "deepspeed_2", "deepspeed_3"):
            sent = cost(name, learned, block, ranks, half=True).sent / GB
            seconds = [sent / speed for speed in LINKS.values()]
            times = [f"{each:.0f} s" if each >= 10 else f"{each:.2g} s" for each in seconds]
            yield "| " + " | ".join([shape, name, f"{sent:.1f}", *times]) + " |"


if __name__ == "__main__":
    print("Memory of a rank in GiB, by strategy and number of ranks", *memory_table(), sep="\n")
    print("\nSent by each of 8 ranks in a step", *traffic_table(), sep="\n")
