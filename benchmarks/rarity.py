"""A base that saw some classes in some places rarely, for the first limitation of the paper (section 4.4, figure 9a).

    python -m benchmarks.rarity                                # trains the base, and asks it for every place
    python launch.py experiment=rarity                         # DreamBooth on it
    python -m benchmarks.limitations outputs/rarity/RUN        # places right and wrong, by how often the base saw them

Of the three places in which no subject is photographed, each class is seen in one as often as in the others, in one an
eighth as often, and in one a sixty-fourth as often. Which is which goes around by class, so that a place or a class is
no rarer by itself, and what is hard about one (the night) is shared out evenly. The autoencoder and the words are those
that ship; the denoiser begins from nothing. The same command goes on after a kill.

OUT/base is a diffusers folder; base/seen.json says how many of the training scenes show a class in a place.
"""

import argparse
import json
import logging
from collections import Counter
from itertools import product
from pathlib import Path

import torch

from dreambooth.families.sd import StableDiffusion
from dreambooth.files import atomic
from dreambooth.pocket import autoencoder, denoiser, encoders, judge, ready
from dreambooth.pocket.backgrounds import CONTEXTS
from dreambooth.pocket.scenes import NOUNS, PLACES, Scenes
from dreambooth.pocket.stage import fit
from dreambooth.pocket.world import Odds

UNSEEN = tuple(name for name in CONTEXTS if name not in ready.PHOTOGRAPHED_IN)
RARER = (1, 8, 64)  # the base sees a class in one place so many times less than in another
SEEN = "seen.json"  # beside the networks: {class: {place: scenes}}


def rarity(noun: str, name: str) -> int:
    """How many times less the base sees a class in a place than in most."""
    return RARER[(NOUNS.index(noun) + UNSEEN.index(name)) % len(RARER)] if name in UNSEEN else 1


def places(noun: str) -> list[float]:
    """The weights of a class's places."""
    return [1 / rarity(noun, name) for name in PLACES]


def seen(scenes: Scenes) -> dict[str, dict[str, int]]:
    """How many scenes show each class in each place."""
    counts = Counter((scene.figure.noun, scene.context) for scene in scenes.scenes)
    return {noun: {name: counts[noun, name] for name in PLACES} for noun in NOUNS}


def train(folder: Path, count: int, steps: int, seed: int) -> Path:
    """Make ``folder``/base of ``count`` scenes; its path."""
    family = StableDiffusion("pocket")
    scenes = Scenes(count, "rarity", folder, Odds(named=0.5, marks=0.7, garment=0.65, places=places))
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


def obeyed(base: Path, each: int) -> dict[int, float]:
    """The share of places that are right in ``each`` pictures of every class in every unseen place, by its rarity."""
    asked = list(product(NOUNS, UNSEEN, range(each)))
    prompts = [f"a photo of a {noun} {CONTEXTS[name]}" for noun, name, _ in asked]
    pixels = denoiser.draw_prompts(StableDiffusion(str(base)).to_pipeline(), prompts, "rarity")
    right = judge.verdicts(encoders.load_judge(), pixels)[:, 2] == torch.tensor([PLACES.index(a[1]) for a in asked])
    levels = torch.tensor([rarity(noun, name) for noun, name, _ in asked])
    return {level: right[levels == level].float().mean().item() for level in RARER}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/rarity"))
    parser.add_argument("--scenes", type=int, default=24000)
    parser.add_argument("--steps", type=int, default=2500, help="of 64 scenes")
    parser.add_argument("--each", type=int, default=6, help="pictures of each class in each place at the end")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    base = train(options.out, options.scenes, options.steps, options.seed)
    for level, share in obeyed(base, options.each).items():
        print(f"seen {level} times less: {share:.2f} of the places right")
    print(base)


if __name__ == "__main__":
    main()
