"""A Stable Diffusion small enough for unit tests, in the diffusers folder layout, with random weights."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

FACTOR, RESOLUTION, WINDOW = 4, 32, 32
SCHEDULERS = {"PNDM": PNDMScheduler, "DDIM": DDIMScheduler}
MERGES = ["p h", "ph o", "pho t", "phot o</w>", "o f</w>", "d o", "do g</w>"]


def byte_symbols() -> list[str]:
    """The 256 printable stand-ins of byte-level BPE in byte order (Radford et al. 2019, ``bytes_to_unicode``)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + moved.index(byte)) for byte in range(256)]


def write_tokenizer(folder: Path, window: int = WINDOW) -> CLIPTokenizer:
    """Write vocab.json and merges.txt that spell any text, with the few merges above, and load them."""
    symbols = byte_symbols()
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *(merge.replace(" ", "") for merge in MERGES)]
    vocab = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": window, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return CLIPTokenizer.from_pretrained(folder)


def build_tiny_sd(
    folder: Path,
    prediction_type: str = "epsilon",
    seed: int = 0,
    scheduler: str = "PNDM",
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a StableDiffusionPipeline folder: VAE factor 4, 32x32 pictures, text window 32, no safety checker."""
    tokenizer = write_tokenizer(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=WINDOW,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=RESOLUTION // FACTOR,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=2,
            cross_attention_dim=16,
            norm_num_groups=4,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=RESOLUTION,
        )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=SCHEDULERS[scheduler](
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction_type,
            **({"skip_prk_steps": True} if scheduler == "PNDM" else {"clip_sample": False}),
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for network in (unet, vae, text_encoder):
        torch.nn.Module.to(network, dtype)
    pipeline.save_pretrained(folder, variant=variant)
    publish_text_encoder(folder / "text_encoder")
    return folder


def publish_text_encoder(folder: Path) -> None:
    """Give the weights their published names: transformers 5 leaves ``text_model.`` out, every hub folder has it."""
    for path in folder.glob("*.safetensors"):
        weights = {f"text_model.{name}": value for name, value in load_file(path).items()}
        save_file(weights, path, {"format": "pt"})


def short_run(model: Path, photos: Path, folder: Path) -> list[str]:
    """Overrides of a run of ``model`` on ``photos`` without the prior, its latents beside its folder."""
    return [
        f"model.from_pretrained={model}",
        f"model.data.instance_dir={photos}",
        f"hydra.run.dir={folder}",
        f"model.data.cached_instance_dir={folder.parent / 'latents'}",
        f"model.data.resolution={RESOLUTION}",
        "model.with_prior_preservation=false",
        "model.micro_batch_size=2",
        "model.optim.lr=1e-3",
        "trainer.accelerator=cpu",
    ]
