"""Files of adapters and new words, ours and other people's, merged into the base that they are drawn with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open

from dreambooth.errors import UserError
from dreambooth.families.base import Family
from dreambooth.families.folder import FAILURES, first_line, quiet
from dreambooth.tuning.words import FILE as WORD

KEY = "infer.adapter"
FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Adapter:
    """A LoRA file in any dialect that diffusers reads, how much it counts, and in which networks; a word's file."""

    path: Path | None
    word: Path | None = None
    scale: float = 1.0
    denoiser: bool = True
    text_encoder: bool = True

    @property
    def whole(self) -> bool:
        """Whether it is drawn as it was trained."""
        return self.scale == 1 and self.denoiser and self.text_encoder

    def merge(self, family: Family) -> None:
        """Add the adapter to the weights of a family, which holds plain weights afterwards, and the word to its reader.

        Raises UserError when a file is of another kind, or was made for another model.
        """
        if self.word is not None and self.text_encoder:
            teach(family, self.word)
        if self.path is not None:
            self.merge_lora(family, self.path)

    def merge_lora(self, family: Family, path: Path) -> None:
        """Add the weights of a LoRA file."""
        with safe_open(path, "pt") as file:
            names = list(file.keys())
        if any("dora_scale" in name for name in names):
            raise UserError(f"{KEY}: {path} is a DoRA in a dialect that diffusers would read as LoRA, wrongly")
        pipeline: Any = family.to_pipeline()
        try:
            with quiet():
                pipeline.load_lora_weights(
                    path.parent, weight_name=path.name, use_safetensors=True, local_files_only=True
                )
        except (*FAILURES, TypeError) as error:
            raise UserError(
                f"{KEY}: {path} does not go with {family.source} ({first_line(error)}): name its base with "
                "infer.model=..., or another file"
            ) from error
        parts = [name for name in family.trainable_networks() if self.counts_in(name) and adapted(family, name)]
        if not any(adapted(family, name) for name in family.trainable_networks()):
            raise UserError(f"{KEY}: {path} has nothing for the networks of {family.source}; name another file")
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


def teach(family: Family, path: Path) -> None:
    """Give the tokenizer and the text encoder of a family the word of a learned_embeds.safetensors."""
    pipeline: Any = family.to_pipeline()
    try:
        with quiet(), torch.random.fork_rng(devices=[]):  # new rows are drawn at random before they are filled
            pipeline.load_textual_inversion(
                path.parent, weight_name=path.name, use_safetensors=True, local_files_only=True
            )
    except (*FAILURES, AttributeError) as error:
        raise UserError(
            f"{KEY}: {path} does not go with {family.source} ({first_line(error)}): name its base with "
            "infer.model=..., or another file"
        ) from error


def find_adapter(source: str) -> dict[str, Path | None]:
    """The safetensors files that ``infer.adapter`` means: itself, or those in a folder or in a run's ``adapter/``.

    ``path``: the LoRA; ``word``: the embeddings of a word; one of them may be None.

    Raises UserError when there is none, several, or one that is no safetensors file.
    """
    path, word = Path(source).expanduser(), None
    if path.is_dir():
        folder = path / "adapter" if (path / "adapter").is_dir() else path
        found = set(folder.glob("*.safetensors"))
        word = folder / WORD if folder / WORD in found else None
        others = found - {word} or found
        path = others.pop() if len(others) == 1 else folder / FILE
    if path.suffix != ".safetensors" or not path.is_file():
        raise UserError(f"{KEY}={source}: there is no {path.name if path.suffix else FILE}; type a .safetensors file")
    if holds_a_word(opened(source, path)):
        return {"path": None, "word": path}
    return {"path": path, "word": word and opened(source, word)}


def opened(source: str, path: Path) -> Path:
    """The path of a file that can be read; UserError otherwise."""
    try:
        with safe_open(path, "pt"):
            return path
    except (SafetensorError, OSError) as error:
        raise UserError(f"{KEY}={source}: {path} cannot be read ({first_line(error)}); copy it anew") from error


def holds_a_word(path: Path) -> bool:
    """Whether a file holds one tensor, the embeddings of a word that is its name."""
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    return len(names) == 1 and "lora" not in names[0]
