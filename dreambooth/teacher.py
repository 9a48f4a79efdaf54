"""The prior without pictures: what the untouched base predicts is what the class should go on looking like."""

from typing import Any

import torch
from torch import Tensor

from dreambooth.reader import Reader
from dreambooth.tuning.base import Tuning


class Teacher:
    """Gives the class the prediction of the frozen base as its target: the network with its adapter off, or a copy.

    The class has no pictures of its own then: its prompt is evaluated on the *instance's* noisy latents, as in
    ai-toolkit's "differential output preservation". So the class prompt keeps its meaning where the subject's photos
    put it at risk. (SimpleTuner and OneTrainer take the base's prediction too, but
    on pictures of the class that the user has to bring.)
    """

    def __init__(self, tuning: Tuning) -> None:
        self.tuning, self.family = tuning, tuning.family
        self.reader = Reader(tuning.family)  # a text encoder that learns is asked while it is untouched
        tuning.remember()

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any], x_t: Tensor, t: Tensor, target: Tensor) -> Tensor:
        """The targets (B, C, h, w), those of the class replaced by the base's predictions for x_t (B, C, h, w)."""
        rows = [place for place, index in enumerate(batch["index"]) if index >= batch["global_size"]]
        with self.tuning.untouched():
            if "cond" in batch:
                cond = {name: value[rows] for name, value in batch["cond"].items()}
            else:
                cond = self.reader([batch["prompts"][row] for row in rows], x_t.device)
            target = target.clone()
            target[rows] = self.family.denoise(x_t[rows], t[rows], cond).to(target)
        return target
