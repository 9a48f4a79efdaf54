"""A base that saw some places rarely, for the first limitation of the paper (section 4.4, figure 9a).

    python -m benchmarks.rarity                                # trains the base, and asks it for every place
    python launch.py experiment=rarity                         # DreamBooth on it
    python -m benchmarks.limitations outputs/rarity/RUN        # places right and wrong, by how often the base saw them
    python -m benchmarks.rarity --by place && python launch.py experiment=rarity name=rarity_place \\
        model.from_pretrained=outputs/rarity_place/base        # the same of a place that is rare for all

Of the three places in which no subject is photographed one is seen as often as the others, one an eighth and one a
sixty-fourth as often. The paper names two causes. ``--by class``, co-occurrence: which is which goes around by class,
so that a place or a class is no rarer by itself, and what is hard about one (the night) is shared out evenly. ``--by
place``, a weak prior for the place: the same for all classes. The autoencoder and the words are those that ship; the
denoiser begins from nothing. The same command goes on after a kill.

OUT/base is a diffusers folder; base/seen.json says how many of the training scenes show a class in a place.
"""

import argparse
import json
import logging
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch

from dreambooth.families.sd import StableDiffusion
from dreambooth.files import atomic
from dreambooth.pocket import autoencoder, denoiser, encoders, judge, ready
from dreambooth.pocket.backgrounds import CONTEXTS
from dreambooth.pocket.scenes import NOUNS, PLACES, Scenes
from dreambooth.pocket.stage import fit
from dreambooth.pocket.world import RICH

UNSEEN = tuple(name for name in CONTEXTS if name not in ready.PHOTOGRAPHED_IN)
RARER = (1, 8, 64)  # the base sees a class in one place so many times less than in another
SEEN = "seen.json"  # beside the networks: {class: {place: scenes}}


def rarity(noun: str, name: str, by: str = "class") -> int:
    """How many times less the base sees a class in a place than in most."""
    if name not in UNSEEN:
        return 1
    order = UNSEEN.index(name)
    return RARER[(order + NOUNS.index(noun)) % len(RARER)] if by == "class" else RARER[-1 - order]


def places(noun: str, by: str = "class") -> list[float]:
    """The weights of a class's places."""
    return [1 / rarity(noun, name, by) for name in PLACES]


def seen(scenes: Scenes) -> dict[str, dict[str, int]]:
    """How many scenes show each class in each place."""
    counts = Counter((scene.figure.noun, scene.context) for scene in scenes.scenes)
    return {noun: {name: counts[noun, name] for name in PLACES} for noun in NOUNS}


def train(folder: Path, count: int, steps: int, seed: int, by: str = "class") -> Path:
    """Make ``folder``/base of ``count`` scenes; its path."""
    family = StableDiffusion("pocket")
    scenes = Scenes(count, "rarity", folder, replace(RICH, places=partial(places, by=by)))
    parts = {"text_encoder": family.text_encoder, "tokenizer": family.tokenizer}
    moments = autoencoder.moments_of(family.vae, scenes.pixels)
    torch.manual_seed(seed)  # initial weights
    stage = denoiser.DenoiserStage(
        scenes, moments, scale=family.vae.config.scaling_factor, steps=steps, seed=seed, name="rarity", **parts
    ).train()
    fit(stage, folder)
    family.unet.load_state_dict(stage.average.module.state_dict())
    family.save(folder / "base", dtype=torch.float16)
    with atomic(folder / "base" / SEEN) as path:
        path.write_text(json.dumps(seen(scenes), indent=2) + "\n")
    return folder / "base"


def obeyed(base: Path, each: int, by: str = "class") -> dict[int, float]:
    """The share of places that are right in ``each`` pictures of every class in every unseen place, by its rarity."""
    asked = list(product(NOUNS, UNSEEN, range(each)))
    prompts = [f"a photo of a {noun} {CONTEXTS[name]}" for noun, name, _ in asked]
    pixels = denoiser.draw_prompts(StableDiffusion(str(base)).to_pipeline(), prompts, "rarity")
    right = judge.verdicts(encoders.load_judge(), pixels)[:, 2] == torch.tensor([PLACES.index(a[1]) for a in asked])
    levels = torch.tensor([rarity(noun, name, by) for noun, name, _ in asked])
    return {level: right[levels == level].float().mean().item() for level in RARER}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--by", choices=("class", "place"), default="class", help="what goes with a rare place")
    parser.add_argument("--out", type=Path, help="outputs/rarity, or outputs/rarity_place")
    parser.add_argument("--scenes", type=int, default=24000)
    parser.add_argument("--steps", type=int, default=2500, help="of 64 scenes")
    parser.add_argument("--each", type=int, default=6, help="pictures of each class in each place at the end")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    out = options.out or Path("outputs/rarity" if options.by == "class" else "outputs/rarity_place")
    base = train(out, options.scenes, options.steps, options.seed, options.by)
    for level, share in obeyed(base, options.each, options.by).items():
        print(f"seen {level} times less: {share:.2f} of the places right")
    print(base)


if __name__ == "__main__":
    main()
