"""Every weight learns."""

from contextlib import AbstractContextManager

from torch import Tensor, nn

from dreambooth.tuning.base import Tuning, swapped


class Full(Tuning):
    """All weights of the denoiser, and of the text encoder where it learns (Ruiz et al. 2022, arXiv 2208.12242)."""

    supports_sharding = True
    copies: list[Tensor]

    def prepare(self, name: str, network: nn.Module) -> None:
        network.requires_grad_(True)

    def remember(self) -> None:
        """Copy all that learns: a frozen teacher, at a quarter of what AdamW and the gradients take besides."""
        self.copies = [weight.detach().clone() for weight in self.weights().values()]

    def base(self) -> AbstractContextManager[None]:
        return swapped(list(self.weights().values()), self.copies)
