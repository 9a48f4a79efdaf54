"""Gate (a): the autoencoder. Everything after it looks through it."""

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from dreambooth.pocket.scenes import Scenes, to_float
from dreambooth.pocket.stage import Stage
from dreambooth.progress import progress_bar

CHANNELS = 16  # of the latents, at an eighth of the side


def build() -> AutoencoderKL:
    """f=8: 64x64 pictures to 16x8x8 latents."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


class AutoencoderStage(Stage):
    """Absolute and squared error, and a KL term just strong enough that the decoder forgives small errors."""

    def __init__(self, scenes: Scenes, steps: int, seed: int, lr: float = 1.5e-3, batch: int = 16, kl: float = 2e-4):
        super().__init__("autoencoder", steps, lr, seed, weight_decay=0.0)
        self.model = build().to(memory_format=torch.channels_last)
        self.scenes, self.batch, self.kl = scenes, batch, kl

    def loss(self, g: torch.Generator) -> Tensor:
        index = torch.randint(len(self.scenes), (self.batch,), generator=g)
        pixels = to_float(self.scenes.pixels[index]).to(self.device, memory_format=torch.channels_last)
        posterior = self.model.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=g).to(self.device)
        error = self.model.decode(posterior.mean + posterior.std * noise).sample - pixels
        divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return error.abs().mean() + 4 * error.pow(2).mean() + self.kl * divergence


class DecoderStage(Stage):
    """The decoder alone on squared error, as Stable Diffusion's ft-mse autoencoder; the latents stay what they are."""

    def __init__(
        self,
        model: AutoencoderKL,
        scenes: Scenes,
        moments: Tensor,
        steps: int,
        seed: int,
        lr: float = 6e-4,
        batch: int = 16,
    ):
        super().__init__("decoder", steps, lr, seed, weight_decay=0.0)
        self.model = model
        self.model.encoder.requires_grad_(False)
        self.model.quant_conv.requires_grad_(False)
        self.scenes, self.moments, self.batch = scenes, moments, batch

    def loss(self, g: torch.Generator) -> Tensor:
        index = torch.randint(len(self.scenes), (self.batch,), generator=g)
        pixels = to_float(self.scenes.pixels[index]).to(self.device, memory_format=torch.channels_last)
        latents = sample(self.moments[index], g).to(self.device)
        return (self.model.decode(latents).sample - pixels).pow(2).mean()


@torch.no_grad()
def moments_of(model: AutoencoderKL, pixels: Tensor, batch: int = 200) -> Tensor:
    """(N, 2C, 8, 8) float16 means and log-variances of uint8 pixels (N, 3, 64, 64)."""
    parts = []
    with progress_bar(len(pixels), "encoding scenes", "scene") as bar:
        for part in pixels.split(batch):
            posterior = model.encode(to_float(part)).latent_dist
            parts.append(torch.cat([posterior.mean, posterior.logvar], dim=1).half())
            bar.update(len(part))
    return torch.cat(parts)


def sample(moments: Tensor, g: torch.Generator) -> Tensor:
    """(B, C, 8, 8) latents drawn from moments, before scaling."""
    mean, logvar = moments.float().chunk(2, dim=1)
    return mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=g)


@torch.no_grad()
def reconstruct(model: AutoencoderKL, pixels: Tensor, batch: int = 100) -> Tensor:
    """Decode the posterior means of float pixels (N, 3, H, W), clipped to [-1, 1]."""
    parts = [model.decode(model.encode(part).latent_dist.mean).sample for part in pixels.split(batch)]
    return torch.cat(parts).clamp(-1, 1)


def psnr(real: Tensor, other: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio, dB, of pixels in [-1, 1]."""
    error = (real - other).pow(2).flatten(1).mean(1)
    return (10 * torch.log10(4 / error)).mean().item()
