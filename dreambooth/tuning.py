"""Which parameters learn."""

from torch import nn

from dreambooth.families.base import Family


def full(family: Family, train_text_encoder: bool = False) -> dict[str, nn.Module]:
    """Let the whole denoiser learn, and the text encoder if asked; freeze the rest and return what learns."""
    learned = {
        name: network
        for name, network in family.trainable().items()
        if train_text_encoder or not name.startswith("text_encoder")
    }
    for name, network in family.networks.items():
        network.requires_grad_(name in learned).train(name in learned)
    return learned
