"""Where networks are: the device that is meant, and being there for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dreambooth.families.base import Family


def pick_device(accelerator: str) -> torch.device:
    """The device that Lightning's ``trainer.accelerator`` means on this machine, for one process."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


@contextmanager
def on_device(family: Family, device: torch.device) -> Iterator[None]:
    """Bring all networks to ``device``, and each back to where it was: frozen ones rest off the accelerator."""
    places = {name: next(network.parameters()).device for name, network in family.networks.items()}
    try:
        family.move(device)
        yield
    finally:
        for name, place in places.items():
            family.move(place, name)
