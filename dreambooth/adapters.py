"""Adapter files, ours and other people's, merged into the base that they are drawn with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open

from dreambooth.errors import UserError
from dreambooth.families.base import Family
from dreambooth.families.folder import FAILURES, first_line, quiet

KEY = "infer.adapter"
FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Adapter:
    """A LoRA file in any dialect that diffusers reads, how much it counts, and in which networks."""

    path: Path
    scale: float = 1.0
    denoiser: bool = True
    text_encoder: bool = True

    @property
    def whole(self) -> bool:
        """Whether it is drawn as it was trained."""
        return self.scale == 1 and self.denoiser and self.text_encoder

    def merge(self, family: Family) -> None:
        """Add the adapter to the weights of a family, which holds plain weights afterwards.

        Raises UserError when the file is of another kind, or was made for another model.
        """
        with safe_open(self.path, "pt") as file:
            names = list(file.keys())
        if any("dora_scale" in name for name in names):
            raise UserError(f"{KEY}: {self.path} is a DoRA in a dialect that diffusers would read as LoRA, wrongly")
        pipeline: Any = family.to_pipeline()
        try:
            with quiet():
                pipeline.load_lora_weights(
                    self.path.parent, weight_name=self.path.name, use_safetensors=True, local_files_only=True
                )
        except (*FAILURES, TypeError) as error:
            raise UserError(
                f"{KEY}: {self.path} does not go with {family.source} ({first_line(error)}): name its base with "
                "infer.model=..., or another file"
            ) from error
        parts = [name for name in family.trainable() if self.counts_in(name) and adapted(family, name)]
        if not any(adapted(family, name) for name in family.trainable()):
            raise UserError(f"{KEY}: {self.path} has nothing for the networks of {family.source}; name another file")
        with torch.no_grad():
            if parts:
                pipeline.fuse_lora(components=parts, lora_scale=self.scale)
            pipeline.unload_lora_weights()

    def counts_in(self, network: str) -> bool:
        """Whether it is switched on in a network of this name."""
        return self.text_encoder if network.startswith("text_encoder") else self.denoiser


def adapted(family: Family, name: str) -> bool:
    """Whether a network has adapters in it."""
    return any(isinstance(part, BaseTunerLayer) for part in family.networks[name].modules())


def find_adapter(source: str) -> Path:
    """The safetensors file that ``infer.adapter`` means: itself, or the one in a folder or in a run's ``adapter/``.

    Raises UserError when there is none, several, or one that is no safetensors file.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        folder = path / "adapter" if (path / "adapter").is_dir() else path
        found = sorted(folder.glob("*.safetensors"))
        path = folder / FILE if folder / FILE in found or len(found) != 1 else found[0]
    if path.suffix != ".safetensors" or not path.is_file():
        raise UserError(f"{KEY}={source}: there is no {path.name if path.suffix else FILE}; type a .safetensors file")
    try:
        with safe_open(path, "pt"):
            return path
    except (SafetensorError, OSError) as error:
        raise UserError(f"{KEY}={source}: {path} cannot be read ({first_line(error)}); copy it anew") from error
