"""``task=pretrain``: everything that the pocket model ships, made from nothing, gate by gate.

Each gate trains (going on where a killed run stopped), is measured, and prints its figures; the manifest keeps them.
"""

import json
import logging
import subprocess
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import open_clip
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from omegaconf import DictConfig, OmegaConf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from dreambooth.config import CONF, command_of
from dreambooth.errors import UserError
from dreambooth.families.folder import quiet
from dreambooth.families.sd import StableDiffusion
from dreambooth.files import atomic
from dreambooth.pocket import autoencoder, denoiser, encoders, eye, imagetext, judge, ready, words
from dreambooth.pocket.backgrounds import CONTEXTS
from dreambooth.pocket.scenes import HUES, NOUNS, PLACES, Scenes, to_float
from dreambooth.pocket.stage import Stage, fit
from dreambooth.pocket.world import RICH
from dreambooth.run_folder import flatten

log = logging.getLogger(__name__)
StageT = TypeVar("StageT", bound=Stage)
GATES = {
    "judge_class": 0.98,
    "judge_colour": 0.98,
    "judge_context": 0.98,
    "psnr_db": 28.0,
    "reconstructed_class": 0.97,
    "reconstructed_colour": 0.97,
    "reconstructed_context": 0.97,
    "triplets_individuals": 0.95,
    "triplets_subjects": 0.95,
    "marks_survive": 0.95,
    "base_class": 0.95,
    "base_colour": 0.90,
    "base_context": 0.95,
}


class _World:
    """What the gates share: the settings, the drawn scenes, and the figures measured so far."""

    def __init__(self, settings: DictConfig, seed: int):
        self.steps, self.seed = settings.steps, seed
        self.folder = Path(settings.folder).expanduser()
        self.train = Scenes(settings.scenes, "train", self.folder)
        self.rich = Scenes(settings.scenes, "rich", self.folder, RICH)
        self.held_out = Scenes(settings.held_out, "held-out", self.folder)
        self.figures: dict[str, float] = {}

    def fitted(self, make: Callable[[], StageT]) -> StageT:
        torch.manual_seed(self.seed)  # initial weights
        stage = make().train()
        fit(stage, self.folder)
        return stage.eval()

    def report(self, **figures: float) -> None:
        for name, value in figures.items():
            gate = GATES.get(name)
            verdict = "" if gate is None else f"  (gate {gate:g}: {'passed' if value >= gate else 'FAILED'})"
            log.info("%-24s %.4f%s", name, value, verdict)
        self.figures |= {name: round(value, 4) for name, value in figures.items()}


def judge_gate(world: _World) -> nn.Sequential:
    """The classifier, and how often it is right on held-out drawings."""
    model = world.fitted(lambda: judge.JudgeStage(world.train, world.steps.judge, world.seed)).model
    seen = judge.verdicts(model, to_float(world.held_out.pixels))
    world.report(**{f"judge_{k}": v for k, v in judge.shares(seen, world.held_out.labels).items()})
    return model


def autoencoder_gate(world: _World, referee: nn.Module) -> tuple[AutoencoderKL, Tensor]:
    """The autoencoder and the training scenes' moments: PSNR on held-out scenes, what the judge sees in them."""
    steps = world.steps
    model = world.fitted(lambda: autoencoder.AutoencoderStage(world.train, steps.autoencoder, world.seed)).model
    moments = autoencoder.moments_of(model, world.train.pixels)
    world.fitted(lambda: autoencoder.DecoderStage(model, world.train, moments, steps.decoder, world.seed))
    real = to_float(world.held_out.pixels)
    copies = autoencoder.reconstruct(model, real)
    shares = judge.shares(judge.verdicts(referee, copies), world.held_out.labels)
    world.report(psnr_db=autoencoder.psnr(real, copies), **{f"reconstructed_{k}": v for k, v in shares.items()})
    return model, moments


def imagetext_gate(world: _World, tokenizer: CLIPTokenizer) -> open_clip.CLIP:
    """The image-text model: how often the right caption wins among those of 250 scenes."""
    stage = world.fitted(lambda: imagetext.ImageTextStage(world.train, tokenizer, world.steps.imagetext, world.seed))
    world.report(imagetext_accuracy=imagetext.accuracy(stage.model, tokenizer, world.held_out))
    imagetext.name_rare_word(stage.model, tokenizer)
    return stage.model


def eye_gate(world: _World, vae: AutoencoderKL) -> VisionTransformer:
    """The ViT: triplets of random individuals of one class, and of the ready subjects, whose marks survive the VAE."""
    views = eye.individuals(world.steps.individuals, 4, "train")
    model = world.fitted(lambda: eye.EyeStage(views, world.steps.eye, world.seed)).model
    world.report(
        triplets_individuals=eye.triplet_accuracy(model, eye.individuals(160, 4, "held-out")),
        triplets_subjects=eye.subject_triplets(model),
        marks_survive=eye.marks_survive(model, vae),
    )
    return model


def denoiser_gate(
    world: _World, vae: AutoencoderKL, moments: Tensor, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """The whole pipeline, with the average of the denoiser's weights.

    It learns words on plain figures, then individuals on rich ones: a base that has seen many marked, dressed figures
    in colours without a name needs only to be told which one, as a base that has seen many breeds of dog.
    """
    scale = denoiser.scaling_factor(moments)
    vae.register_to_config(scaling_factor=scale)
    shared: dict[str, Any] = {"scale": scale, "text_encoder": text_encoder, "tokenizer": tokenizer, "seed": world.seed}
    stage = world.fitted(lambda: denoiser.DenoiserStage(world.train, moments, steps=world.steps.denoiser, **shared))
    start, moments = stage.average.module, autoencoder.moments_of(vae, world.rich.pixels)
    stage = world.fitted(
        lambda: denoiser.DenoiserStage(
            world.rich, moments, steps=world.steps.individual, lr=4e-4, name="individual", start=start, **shared
        )
    )
    return denoiser.pipeline(vae, text_encoder, tokenizer, stage.average.module)


def obeys(
    pipe: StableDiffusionPipeline, referee: nn.Module, every: int = 1, seed: int | str = "obeys"
) -> tuple[dict[str, float], Tensor]:
    """Shares of right class, colour and context over each ``every``-th of all 432 such prompts, and the pictures."""
    wanted = list(product(range(len(NOUNS)), range(len(HUES)), range(len(PLACES))))[::every]
    prompts = [f"a {HUES[hue]} {NOUNS[noun]} {CONTEXTS[PLACES[where]]}" for noun, hue, where in wanted]
    pixels = denoiser.draw_prompts(pipe, prompts, seed)
    return judge.shares(judge.verdicts(referee, pixels), torch.tensor(wanted)), pixels


def _begin(settings: DictConfig) -> None:
    """Keep what decides the weights beside the checkpoints; UserError where these are of other settings."""
    path = Path(settings.folder).expanduser() / "settings.json"
    names = ("seed", "scenes", "held_out", "steps")
    own: Any = {name: value for name, value in OmegaConf.to_container(settings).items() if name in names}  # type: ignore
    before, now = flatten(json.loads(path.read_text()) if path.exists() else own), flatten(own)
    other = "; ".join(f"pretrain.{key} {before[key]} → {value}" for key, value in now.items() if before[key] != value)
    if other:
        raise UserError(
            f"pretrain.folder={settings.folder} holds a pretraining with other settings ({other}): type the old values "
            "to go on with it, or pretrain.folder=ANOTHER_FOLDER"
        )
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(own, indent=2) + "\n")


def _commit() -> str | None:
    """The commit of the checkout that this is; None of an installed package, or without git."""
    if not (CONF.parent / ".git").exists():
        return None
    try:
        asked = ["git", "-C", str(CONF.parent), "rev-parse", "HEAD"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _ship(
    world: _World, pipe: StableDiffusionPipeline, networks: dict[str, nn.Module], folder: Path, command: str | None
) -> None:
    with tempfile.TemporaryDirectory(dir=world.folder) as temporary:
        with quiet():
            pipe.save_pretrained(temporary)
        family = StableDiffusion(temporary)
        family.save(folder / "base", dtype=torch.float16)
    words.save(pipe.tokenizer, folder / "base" / "tokenizer")
    for name, model in networks.items():
        encoders.save(model, name, folder / "encoders")
    manifest = {
        "command": command,
        "commit": _commit(),
        "seed": world.seed,
        "scenes": len(world.train),
        "steps": OmegaConf.to_container(world.steps),
        "figures": world.figures,
        "gates": GATES,
    }
    with atomic(folder / "manifest.json") as path:
        path.write_text(json.dumps(manifest, indent=2) + "\n")


def pretrain(cfg: DictConfig) -> Path:
    """Train every gate in order and write ``pretrain.out_path``: base/, encoders/, manifest.json.

    Raises:
        UserError: a gate was not reached, and what was made stays in ``pretrain.folder``, nothing is shipped; or what
            lies there is of other settings.
    """
    settings = cfg.pretrain
    _begin(settings)
    world = _World(settings, settings.seed)
    tokenizer = words.kept(world.folder / "tokenizer")
    referee = judge_gate(world)
    vae, moments = autoencoder_gate(world, referee)
    clip = imagetext_gate(world, tokenizer)
    vit = eye_gate(world, vae)
    pipe = denoiser_gate(world, vae, moments, imagetext.text_encoder(clip, tokenizer), tokenizer)
    shares, _ = obeys(pipe, referee, settings.every_nth_prompt)
    world.report(**{f"base_{name}": value for name, value in shares.items()})
    missed = [name for name, gate in GATES.items() if world.figures[name] < gate]
    if missed and not settings.ship_anyway:
        raise UserError(
            f"gates not reached: {', '.join(missed)}; raise pretrain.steps or set pretrain.ship_anyway=true"
        )
    out_path = Path(settings.out_path).expanduser()
    _ship(world, pipe, {"imagetext": clip, "eye": vit, "judge": referee}, out_path, command_of(cfg))
    ready.write(out_path.parent / "subjects")
    return out_path
