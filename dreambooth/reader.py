"""What a text encoder that rests says of prompts."""

import torch
from torch import Tensor

from dreambooth.families.base import Family


class Reader:
    """Conditions of prompts, each read once, alone and without gradient, and kept in memory.

    The text encoders are on the device only while something new is read, and on the CPU afterwards, unless they learn.
    """

    def __init__(self, family: Family) -> None:
        self.family = family
        self.known: dict[str, dict[str, Tensor]] = {}

    def __call__(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """What ``denoise`` takes of the prompts, (B, …) each, on the device."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.known]
        if new:
            networks = [name for name in self.family.networks if name.startswith("text_encoder")]
            self.family.move(device, *networks)
            with torch.no_grad():
                self.known |= {prompt: self.family.encode_prompts([prompt]) for prompt in new}
            for name in networks:
                if not any(weight.requires_grad for weight in self.family.networks[name].parameters()):
                    self.family.move("cpu", name)
        parts = [self.known[prompt] for prompt in prompts]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
