"""Does DreamBooth bind, and does the prior hold? Measured on the ready subjects of the pocket world.

    python benchmarks/binding.py [--subjects dog cat2] [--without-prior] [--out outputs/binding] [OVERRIDE ...]

For each subject the default job runs to its last step, unmeasured on the way; then the untouched base and the result
draw the same prompts with the same seeds: the instance prompt alone and in each of the six places, and the class
prompt, four or eight pictures each. Printed, and written to OUT/binding.json:

likeness  mean cosine of generated and real pictures in the ViT's features: base, after, real against real (no picture
          with itself), and the share of the way from base to real that the run covered
context   share of pictures in the place that their prompt names, by the judge
copy      mean cosine to the nearest photograph in the image-text model's features, which see the background, less the
          same between photographs
drift     how far the class prompt's pictures moved toward the subject: likeness after less likeness before
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from dreambooth import compose, train
from dreambooth.files import atomic
from dreambooth.pocket import WEIGHTS, encoders, eye, judge, ready
from dreambooth.pocket.backgrounds import CONTEXTS
from dreambooth.pocket.scenes import PLACES, tensor_of, to_float
from dreambooth.sampling import draw, picture_seed

SEED = 4321  # not the samples' own


def pictures(pipe, prompts: list[str], count: int, settings: dict) -> Tensor:
    """(len(prompts) * count, 3, 64, 64) float pixels in [-1, 1]."""
    rows: list[Image.Image] = []
    for number, prompt in enumerate(prompts):
        seeds = [picture_seed(SEED, number, i) for i in range(count)]
        rows += draw(pipe, [prompt] * count, seeds, negative_prompt=None, resolution=64, **settings)
    return to_float(torch.stack([tensor_of(row) for row in rows]))


def likeness(vit, some: Tensor, photos: Tensor) -> float:
    """Mean cosine over all pairs."""
    return (eye.features(vit, some) @ eye.features(vit, photos).T).mean().item()


def among(similarity: Tensor) -> Tensor:
    """A square of similarities without its diagonal, (N, N - 1)."""
    count = len(similarity)
    return similarity[~torch.eye(count, dtype=torch.bool)].view(count, count - 1)


def measure(subject: str, overrides: list[str], networks: dict) -> dict[str, float]:
    """One subject, one run: every figure of the table."""
    cfg = compose([f"model/data=pocket_{subject}", "callbacks.sample_grid=null", "callbacks.evaluate=null", *overrides])
    data, sampler = cfg.model.data, cfg.evaluate
    settings = {
        "steps": sampler.inference_steps,
        "guidance": sampler.unconditional_guidance_scale,
        "guidance_rescale": sampler.guidance_rescale,
        "sampler_type": sampler.sampler_type,
    }
    photos = to_float(torch.stack([tensor_of(photo) for photo in ready.photographs(subject)]))
    placed = [f"{data.instance_prompt} {words}" for words in CONTEXTS.values()]
    run = train(cfg)
    row: dict[str, float] = {"seconds": run.summary["seconds"]["total"]}
    for when, folder in (("base", WEIGHTS), ("after", run.folder / "pipeline")):
        pipe = DiffusionPipeline.from_pretrained(str(folder), safety_checker=None)
        own = torch.cat([pictures(pipe, [data.instance_prompt], 8, settings), pictures(pipe, placed, 4, settings)])
        row[f"likeness_{when}"] = likeness(networks["vit"], own, photos)
        wanted = torch.arange(len(PLACES)).repeat_interleave(4)
        row[f"context_{when}"] = (judge.verdicts(networks["judge"], own[8:])[:, 2] == wanted).float().mean().item()
        others = pictures(pipe, [data.regularization_prompt], 8, settings)
        row[f"class_{when}"] = likeness(networks["vit"], others, photos)
    with torch.no_grad():
        seen = networks["clip"].encode_image(photos, normalize=True)
        nearest = (networks["clip"].encode_image(own, normalize=True) @ seen.T).max(1).values.mean()
    row["copy"] = (nearest - among(seen @ seen.T).max(1).values.mean()).item()
    features = eye.features(networks["vit"], photos)
    row["likeness_real"] = among(features @ features.T).mean().item()
    row["covered"] = (row["likeness_after"] - row["likeness_base"]) / (row["likeness_real"] - row["likeness_base"])
    row["drift"] = row["class_after"] - row["class_base"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", default=list(ready.SUBJECTS), choices=list(ready.SUBJECTS))
    parser.add_argument("--without-prior", action="store_true", help="run each subject without the prior as well")
    parser.add_argument("--out", type=Path, default=Path("outputs/binding"))
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    networks = {"vit": encoders.load_eye(), "judge": encoders.load_judge(), "clip": encoders.load_imagetext()}
    rows: dict[str, dict[str, float]] = {}
    print(f"{'':24}{'base':>8}{'after':>8}{'real':>8}{'covered':>9}{'context':>9}{'copy':>8}{'drift':>8}{'seconds':>9}")
    for subject in options.subjects:
        for prior in (True, False) if options.without_prior else (True,):
            name = subject if prior else f"{subject}, no prior"
            switch = f"model.with_prior_preservation={str(prior).lower()}"
            rows[name] = row = measure(subject, [*options.overrides, switch], networks)
            print(
                f"{name:24}{row['likeness_base']:8.3f}{row['likeness_after']:8.3f}{row['likeness_real']:8.3f}"
                f"{row['covered']:9.2f}{row['context_after']:9.2f}{row['copy']:8.3f}{row['drift']:8.3f}"
                f"{row['seconds']:9.1f}",
                flush=True,
            )
            options.out.mkdir(parents=True, exist_ok=True)
            with atomic(options.out / "binding.json") as path:
                path.write_text(json.dumps(rows, indent=2) + "\n")
    if options.without_prior:
        drifts = [sum(row["drift"] for name, row in rows.items() if name.endswith("no prior") == off) for off in (0, 1)]
        print(f"drift with the prior over drift without: {drifts[0] / drifts[1]:.2f}")


if __name__ == "__main__":
    main()
