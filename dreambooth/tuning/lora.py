"""Low-rank adapters beside frozen weights, through PEFT."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from dreambooth.errors import UserError
from dreambooth.families.base import Family
from dreambooth.families.folder import published
from dreambooth.noise import seed_of
from dreambooth.tuning.base import TEXT, Tuning

ADAPTER = "default"  # PEFT's own name for an adapter, by which diffusers' loaders look


class Lora(Tuning):
    """W + s·B·A in the place of W; A (rank, in) and B (out, rank) learn, in float32 (Hu et al. 2021, arXiv 2106.09685).

    s = alpha / rank, or alpha / sqrt(rank) with ``use_rslora`` (Kalajdzievski 2023, 2312.03732). With ``use_dora`` the
    length of each row of the sum learns, too, apart from its direction (Liu et al. 2024, 2402.09353). A is drawn from
    N(0, 1/rank²), B is 0: the first step begins at the base.

    Args:
        family, train_text_encoder, text_encoder_lr, stop_text_encoder_at: see ``Tuning``.
        rank, alpha, dropout: of every adapter; dropout of what A reads.
        target_modules: last parts of the names of the layers that get one, in whichever network they occur.
        seed: of A.

    Raises:
        UserError: a network has no such layer, or PEFT has no adapter for its kind.
    """

    saves_adapter, supports_sharding = True, True

    def __init__(
        self,
        family: Family,
        rank: int,
        alpha: float,
        target_modules: list[str],
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        seed: int = 0,
        **text: Any,
    ) -> None:
        self.config = {
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": dropout,
            "use_rslora": use_rslora,
            "use_dora": use_dora,
            "target_modules": list(target_modules),
        }
        self.seed = seed
        super().__init__(family, **text)

    def prepare(self, name: str, network: nn.Module) -> None:
        config = LoraConfig(**self.config, init_lora_weights="gaussian")  # type: ignore[arg-type]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(self.seed, name, "adapter"))
            try:
                inject_adapter_in_model(config, network, ADAPTER)
            except ValueError as error:
                problem = str(error).split(". ")[0]
                raise UserError(f"model.tuning.target_modules: the {name} takes no adapter there: {problem}") from error

    def layers(self) -> list[Any]:
        """The layers with an adapter, of all networks."""
        return [layer for layer in self.learned.modules() if isinstance(layer, BaseTunerLayer)]

    @contextmanager
    def base(self) -> Iterator[None]:
        layers = self.layers()
        try:
            for layer in layers:
                # Not by enable_adapters(False), which says also that they learn no longer.
                layer._disable_adapters = True
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Within, W + s·B·A are plain weights; afterwards W is the very tensor it was. Nested, it does nothing."""
        layers = [layer for layer in self.layers() if not layer.merged]
        weights = [layer.get_base_layer().weight for layer in layers]
        kept = [weight.data for weight in weights]
        try:
            with torch.no_grad():
                for layer, weight in zip(layers, weights, strict=True):
                    weight.data = weight.data.clone()
                    layer.merge()
            yield
        finally:
            for layer, weight, value in zip(layers, weights, kept, strict=True):
                weight.data = value
                layer.merged_adapters.clear()

    def save(self, folder: Path) -> None:
        """Write pytorch_lora_weights.safetensors in diffusers' layout, with the settings of the adapters.

        Without these, alpha would be taken for the rank. Only settings that every PEFT knows: an older one refuses
        others.
        """
        parts: dict[str, Any] = {}
        for name, network in self.learned.items():
            if not hasattr(network, "peft_config"):
                continue
            weights = published(network, get_peft_model_state_dict(network, adapter_name=ADAPTER))
            on_cpu = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
            if name.startswith(TEXT):  # transformers 5 looks for DoRA's lengths by the full name, which all others take
                on_cpu = {key + ".weight" * key.endswith("_vector"): value for key, value in on_cpu.items()}
            parts[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(on_cpu)
            parts[f"{name}_lora_adapter_metadata"] = self.config
        type(self.family.to_pipeline()).save_lora_weights(folder, **parts)
