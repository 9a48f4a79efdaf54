"""Where networks are: the device that is meant, and being there for a while; and what a CPU's memory needs for it."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dreambooth.families.base import Family
from dreambooth.slurm import device_count

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def pick_device(accelerator: str) -> torch.device:
    """The device that Lightning's ``trainer.accelerator`` means on this machine, for one process."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def all_devices(accelerator: str) -> int:
    """What ``trainer.devices=auto`` comes to here; a CPU is one, whatever its cores."""
    return 1 if accelerator == "cpu" else max(1, torch.cuda.device_count())


def devices_of(trainer: Any) -> int:
    """How many devices of this machine ``trainer.devices`` means."""
    asked = device_count(trainer.devices)
    return all_devices(trainer.accelerator) if asked is None else asked


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


def keep_freed_memory(device: torch.device) -> None:
    """Have glibc keep what a step on a CPU frees (up to 256 MB) for the next one, for as long as this process lives.

    By itself it gives it back to the kernel at the end of each step, and the next pays a page fault for every 4 KB:
    3,400 of them in a step of the pocket model, some 7 % of its time. Nothing happens for another device or malloc.
    Source: mallopt(3), https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and device.type == "cpu":
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that it takes; larger blocks are given back as ever
        mallopt(M_TRIM_THRESHOLD, 256 << 20)
