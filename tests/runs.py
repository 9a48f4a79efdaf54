"""Run folders made up in code, with every part that a report shows."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageDraw

PROMPT, CLASS = "a photo of a sks dog", "a photo of a dog"
PLACES = ("", " on the beach")


def make_run(folder: Path, *, side: int = 64, photo_side: int = 64, lr: float = 2e-4, **settings: Any) -> Path:
    """A finished and evaluated run of 60 steps: two prompts of two pictures, three of the class, three photos."""
    folder.mkdir(parents=True)
    prompt = settings.get("prompt", PROMPT)
    photos = draw_pictures(folder.parent / f"photos {folder.name}", 3, photo_side, "jpg")
    data = {"instance_prompt": prompt, "regularization_prompt": CLASS, "instance_dir": str(photos), "resolution": side}
    model = {"from_pretrained": "pocket", "with_prior_preservation": True, "optim": {"lr": lr}, "data": data}
    config = {"seed": 1, "run_dir": str(folder), "trainer": {"max_steps": 60}, "model": model}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True, sort_keys=False))
    changed = {"model.optim.lr": [1e-4, lr]}
    command = f"dreambooth model.optim.lr={lr:g} 'model.data.instance_prompt={prompt}'"
    (folder / "overrides.yaml").write_text(yaml.safe_dump({"command": command, "changed": changed}))
    write_metrics(folder)
    write_scores(folder, side, prompt)
    (folder / "summary.json").write_text(json.dumps(summary(dino=0.5 + 1000 * lr)))
    samples = draw_pictures(folder / "samples", 2, 200, "png")
    for number, step in enumerate((0, 60)):
        (samples / f"{number}.png").rename(samples / f"step_{step:06d}.png")
    (folder / "pipeline").mkdir()
    return folder


def draw_pictures(folder: Path, count: int, side: int, suffix: str) -> Path:
    """Noisy pictures of a disc, 0, 1, 2, …: noise is what compresses worst."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 255, (side, side, 3), dtype=np.uint8)
        picture = Image.fromarray(noise)
        ImageDraw.Draw(picture).ellipse((side // 4, side // 4, side // 2, side // 2), fill=(200, 40 * number, 90))
        picture.save(folder / f"{number}.{suffix}")
    return folder


def write_metrics(folder: Path) -> None:
    """metrics.csv and curves.csv: a missing cell, a loss that is not finite, and a row that a kill cut short."""
    header = "step,loss,instance_loss,prior_loss,lr,grad_norm,seconds"
    rows = [f"{step},{1 / step:.4g},{0.5 / step:.4g},{0.5 / step:.4g},0.0001,1,0.2" for step in range(1, 61)]
    rows[30] = "31,nan,nan,0.1,0.0001,nan,0.2"
    (folder / "metrics.csv").write_text("\n".join([header, *rows, "61,0.0"]))
    scores = [f"{step},{0.7 - 0.3 * math.exp(-step / 20):.4f},,0.3,0.35,,0.6,0.1" for step in range(0, 61, 20)]
    (folder / "curves.csv").write_text("\n".join(["step,dino,clip_i,clip_t,pres,div,copy,score", *scores, ""]))


def write_scores(folder: Path, side: int, prompt: str) -> None:
    """evaluation/: the pictures before and after, and what they score."""
    rows: list[dict[str, Any]] = []
    wanted = [(prompt + place, "subject", 2) for place in PLACES] + [(CLASS, "class", 3)]
    for kind in ("before", "after"):
        draw_pictures(folder / "evaluation" / kind, 7, side, "png")
        for index, (text, role, count) in enumerate(wanted):
            for picture in range(count):
                number = sum(1 for row in rows if row["set"] == kind)
                (folder / "evaluation" / kind / f"{number}.png").rename(
                    folder / "evaluation" / kind / f"{number:05d}.png"
                )
                own = {"dino": 0.6 + 0.01 * number, "copy": 0.7 + 0.01 * number, "nearest": f"{picture}.jpg"}
                scores = own if role == "subject" else {"pres": 0.35, "nearest": None}
                rows.append(
                    {"set": kind, "file": f"{kind}/{number:05d}.png", "role": role, "prompt": text}
                    | {"prompt_index": index, "picture_index": picture, "dino": None, "copy": None, "pres": None}
                    | scores
                )
    rows.append({"set": "real", "file": "0.jpg", "role": "photo", "prompt": None, "dino": 0.8, "nearest": None})
    (folder / "evaluation" / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def summary(dino: float = 0.7) -> dict[str, Any]:
    """summary.json with all that may be in it."""
    metrics: dict[str, Any] = {
        "before": {"dino": 0.4, "clip_i": 0.5, "clip_t": 0.31, "pres": 0.35, "div": None, "copy": 0.6},
        "after": {"dino": dino, "clip_i": 0.75, "clip_t": 0.3, "pres": 0.37, "div": None, "copy": 0.79},
        "real": {"dino": 0.8, "clip_i": 0.85, "clip_t": None, "pres": None, "div": 0.4, "copy": 0.81},
    }
    metrics["intervals"] = {
        kind: {name: None if value is None else [value - 0.021, value + 0.021] for name, value in means.items()}
        for kind, means in metrics.items()
    }
    metrics |= {"encoders": {"dino": "a ViT", "clip": "a CLIP"}, "text": "class"}
    seconds = {"prepare_regularization": 20.0, "cache_latents": 1.0, "train": 90.5, "sample": 5.0, "total": 130.25}
    return {
        "seconds": seconds,
        "steps": 60,
        "steps_per_second": 4.5,
        "peak_memory_mb": 1536,
        "num_instance": 3,
        "final": {"loss": 0.2},
        "versions": {"dreambooth": "0.1.0", "torch": "2.15.0"},
        "metrics": metrics,
        "best_step": 40,
        "stopped": None,
    }
