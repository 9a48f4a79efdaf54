"""The pocket model's encoders: the image-text model and the ViT that ship with it."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dreambooth.metrics.encoders import in_batches, pixels_of
from dreambooth.pocket import encoders, imagetext
from dreambooth.pocket.world import SIZE


class PocketClip:
    """The pocket's image-text model (open_clip's architecture); pictures are brought to 64x64 pixels."""

    name = "pocket image-text model"

    def __init__(self) -> None:
        self.model, self.tokenizer = encoders.load_imagetext(), encoders.load_tokenizer()

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit features (N, 128) of N pictures."""
        return in_batches(
            self.model, lambda batch: self.model.encode_image(batch, normalize=True), pixels_of(pictures, SIZE)
        )

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit features (N, 128) of N prompts."""
        with torch.no_grad():
            tokens = imagetext.tokenize(self.tokenizer, prompts).to(next(self.model.parameters()).device)
            return self.model.encode_text(tokens, normalize=True).cpu()


class PocketViT:
    """The pocket's self-supervised ViT, in the place of DINO: class token, unit length, 64x64 pixels."""

    name = "pocket ViT"

    def __init__(self) -> None:
        self.model = encoders.load_eye()

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit features (N, 128) of N pictures."""
        return in_batches(self.model, lambda batch: F.normalize(self.model(batch), dim=-1), pixels_of(pictures, SIZE))


class PocketLpips:
    """LPIPS's formula (arXiv 1801.03924, equation 1) over the four blocks of the pocket's ViT, all weights one.

    Tokens are brought to unit length, their squared differences summed over channels, averaged over the 64 patches,
    and summed over the blocks. Not comparable with LPIPS on AlexNet.
    """

    name = "LPIPS formula over pocket ViT"

    def __init__(self) -> None:
        self.model = encoders.load_eye()

    def distances(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Distances (N, N) between N pictures, 0 on the diagonal."""
        tokens = in_batches(self.model, self._tokens, pixels_of(pictures, SIZE))
        rows = [(tokens - one).pow(2).sum(-1).mean(-1).sum(-1) for one in tokens]
        return torch.stack(rows)

    def _tokens(self, pixels: Tensor) -> Tensor:
        """(B, blocks, patches, channels) unit tokens."""
        blocks: Any = self.model.forward_intermediates(pixels, output_fmt="NLC", intermediates_only=True)
        return F.normalize(torch.stack(blocks, dim=1), dim=-1)
