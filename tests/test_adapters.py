"""What a run with an adapter leaves, and what is drawn with it, with other people's and without."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from dreambooth.adapters import Adapter
from dreambooth.callbacks.evaluate import Evaluate, kept_step
from dreambooth.config import compose
from dreambooth.errors import UserError
from dreambooth.evaluation import evaluate
from dreambooth.families.base import own_weights
from dreambooth.families.sd import StableDiffusion
from dreambooth.generation import generate
from dreambooth.parallel.tensors import read
from dreambooth.picture_files import read_settings
from dreambooth.sampling import draw
from dreambooth.tasks import RunResult, train
from dreambooth.tuning.lora import Lora
from tests.steps import module_of
from tests.test_evaluate import MEASURED, settings
from tests.test_tuning import LAYERS, LORA
from tests.tiny import build_tiny_sd, short_run

FILE = "adapter/pytorch_lora_weights.safetensors"
QUICK = ["infer.prompts=a dog", "infer.num_images_per_prompt=1", "infer.inference_steps=2", "infer.seed=3"]


@pytest.fixture(scope="module")
def run(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """Two steps of adapters of rank 2 and alpha 6 in both networks, at a rate that shows in the pictures."""
    photos = tmp_path_factory.mktemp("photos")
    for number in range(3):
        Image.effect_noise((40, 40), 30 * number + 10).convert("RGB").save(photos / f"{number}.png")
    return train(compose(overrides(tiny_sd, photos, tmp_path_factory.mktemp("run") / "one")))


def overrides(model: Path, photos: Path, folder: Path) -> list[str]:
    return [
        "model/tuning=lora",
        *short_run(model, photos, folder),
        "model.tuning.rank=2",
        "model.tuning.alpha=6",
        "model.train_text_encoder=true",
        "model.optim.lr=0.2",
        "trainer.max_steps=2",
        "callbacks.sample_grid=null",
        "callbacks.evaluate=null",
        "logger=none",
    ]


def one(model: Path, out: Path, *more: str, base: Path | None = None) -> np.ndarray:
    """The picture of task=generate, and nothing about where it lies."""
    shutil.rmtree(out, ignore_errors=True)
    named = [f"infer.model={model}"] if base is None else [f"model.from_pretrained={base}"]
    path = generate(compose([*named, *QUICK, f"infer.out_path={out}", "trainer.accelerator=cpu", *more]))[0]
    assert read_settings(path)["prompt"] == "a dog"
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


@pytest.mark.slow
def test_the_run_holds_the_adapter_alone(run: RunResult, tiny_sd: Path, tmp_path: Path) -> None:
    folder = run.folder
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "adapter",
        "checkpoints",
        "config.yaml",
        "metrics.csv",
        "overrides.yaml",
        "report.html",
        "summary.json",
    }
    state = read(folder / "checkpoints/step_000002.ckpt", "weights/")
    assert all(".lora_" in key for key in state)
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert {key.split(".")[0] for key in state} == {"unet", "text_encoder"}

    # Drawn by diffusers alone, and merged by us.
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    pipeline.load_lora_weights(folder / "adapter")
    ours = one(folder, tmp_path / "ours")
    picture = read_settings(tmp_path / "ours" / "00000.png")
    guidance = picture["unconditional_guidance_scale"]
    how: dict[str, Any] = {"steps": 2, "guidance": guidance, "sampler_type": "DDIM", "resolution": 32}
    alone = np.asarray(draw(pipeline, ["a dog"], [picture["picture_seed"]], **how)[0]).astype(int)
    assert np.abs(alone - ours).max() <= 1
    assert "infer.model" in (folder / "report.html").read_text()


def test_a_scaled_adapter_is_counted_by_its_scale(run: RunResult, tiny_sd: Path) -> None:
    """W + scale · alpha / rank · B·A, where it is switched on."""
    state = read(run.folder / "checkpoints/step_000002.ckpt", "weights/")
    base, family = StableDiffusion(str(tiny_sd)), StableDiffusion(str(tiny_sd))
    Adapter(run.folder / FILE, scale=0.5).merge(family)
    changed = 0
    for name in ("unet", "text_encoder"):
        merged = own_weights(family.networks[name])
        for key, weight in own_weights(base.networks[name]).items():
            stem = f"{name}.{key.removesuffix('.weight')}"
            a, b = (state.get(f"{stem}.lora_{part}.default.weight") for part in "AB")
            expected = weight if a is None or b is None else weight + 0.5 * 6 / 2 * b @ a
            torch.testing.assert_close(merged[key], expected, rtol=1e-5, atol=1e-6)
            changed += a is not None
    assert changed == len(state) / 2


@pytest.mark.exhaustive
def test_scale_and_switches(run: RunResult, tiny_sd: Path, tmp_path: Path) -> None:
    whole, plain = one(run.folder, tmp_path / "a"), one(tiny_sd, tmp_path / "b")
    off = ["infer.adapter_denoiser=false", "infer.adapter_text_encoder=false"]
    assert np.array_equal(one(run.folder, tmp_path / "a", "infer.adapter_scale=1e-30"), plain)
    assert np.array_equal(one(run.folder, tmp_path / "a", *off), plain)
    parts = [one(run.folder, tmp_path / "a", switch) for switch in off]
    pictures = [whole, plain, *parts, one(run.folder, tmp_path / "a", "infer.adapter_scale=0.5")]
    assert len({picture.tobytes() for picture in pictures}) == 5
    adapter = f"infer.adapter={run.folder}"
    for path in (run.folder, run.folder / "adapter", run.folder / FILE):
        adapter = f"infer.adapter={path}"
        assert np.array_equal(one(tiny_sd, tmp_path / "c", adapter), whole)
    assert np.array_equal(one(tiny_sd, tmp_path / "c", adapter, f"hydra.run.dir={tmp_path}", base=tiny_sd), whole)


def test_a_file_in_another_dialect(run: RunResult, tiny_sd: Path, tmp_path: Path) -> None:
    """Kohya's names, with an alpha for every layer and no settings."""
    weights: dict[str, torch.Tensor] = {}
    for key, value in load_file(run.folder / FILE).items():
        network, rest = key.split(".", 1)
        stem, part = rest.replace("lora_linear_layer", "lora").rsplit(".lora.", 1)
        name = ("lora_unet_" if network == "unet" else "lora_te_") + stem.replace(".", "_")
        weights[f"{name}.lora_{part}"] = value
        weights[f"{name}.alpha"] = torch.tensor(6.0)
    save_file(weights, tmp_path / "kohya.safetensors")
    ours = one(run.folder, tmp_path / "a")
    theirs = one(tiny_sd, tmp_path / "b", f"infer.adapter={tmp_path / 'kohya.safetensors'}")
    assert np.abs(ours - theirs).max() <= 1


@pytest.mark.slow
def test_what_is_no_adapter_for_this_model_is_named(run: RunResult, tiny_sd: Path, tmp_path: Path) -> None:
    def wrong(path: Path, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            one(tiny_sd, tmp_path / "out", f"infer.adapter={path}")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    weights = load_file(run.folder / FILE)
    wrong(tmp_path / "none.safetensors", r"infer\.adapter=.*there is no none\.safetensors")
    (tmp_path / "pickled.bin").write_bytes(b"")
    wrong(tmp_path / "pickled.bin", r"type a \.safetensors file")
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    wrong(tmp_path / "broken.safetensors", "cannot be read")
    save_file({key: torch.zeros(7, 7) for key in weights}, tmp_path / "other.safetensors")
    wrong(tmp_path / "other.safetensors", "does not go with")
    save_file({f"transformer.{key}": value for key, value in weights.items()}, tmp_path / "flux.safetensors")
    wrong(tmp_path / "flux.safetensors", "nothing for the networks")
    save_file({"lora_unet_x.dora_scale": torch.zeros(2)}, tmp_path / "dora.safetensors")
    wrong(tmp_path / "dora.safetensors", "DoRA in a dialect")
    with pytest.raises(UserError, match=r"infer\.adapter: .* has an adapter of its own; type infer\.model="):
        generate(compose(["task=generate", f"infer.model={run.folder}", f"infer.adapter={run.folder}"]))


def test_the_best_step_is_kept_and_put_back(tiny_sd: Path, tmp_path: Path) -> None:
    """Only what learns, and strictly that."""
    callback: Any = Evaluate.__new__(Evaluate)
    module, other = (module_of(tiny_sd, tuning=LORA) for _ in range(2))
    for weight in module.learning():
        weight.data += 1
    callback._keep(module, tmp_path / "best.safetensors", 7)
    assert kept_step(tmp_path / "best.safetensors") == 7
    assert set(load_file(tmp_path / "best.safetensors")) == module.tuning.names
    other.settle_on(load_file(tmp_path / "best.safetensors"))
    assert all(torch.equal(*pair) for pair in zip(module.learning(), other.learning(), strict=True))
    full = module_of(tiny_sd)
    with pytest.raises((KeyError, RuntimeError)):
        full.settle_on(load_file(tmp_path / "best.safetensors"))
    tall = module_of(tiny_sd, tuning=lambda family, **text: Lora(family, 3, 3, LAYERS, **text))
    with pytest.raises((KeyError, RuntimeError)):
        tall.settle_on(load_file(tmp_path / "best.safetensors"))


@pytest.mark.slow
def test_merged_on_request_is_what_the_adapter_draws(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    """With the teacher's prior, which asks for no picture of the class; and a base of other weights is refused."""
    prior = ["model.with_prior_preservation=true", "model.prior=teacher", "model.data.num_reg_images=0"]
    folder, classes = tmp_path / "run", tmp_path / "class"
    more = [*prior, f"model.data.regularization_dir={classes}", "callbacks.export.merged=true"]
    done = train(compose([*overrides(tiny_sd, photos, folder), *more]))
    assert (done.summary["num_regularization"], done.summary["regularization_generated"]) == (0, 0)
    assert not classes.exists()
    assert not classes.with_name("class_cached").exists()
    assert done.summary["final"]["prior_loss"] > 0
    whole = one(folder, tmp_path / "a")
    shutil.rmtree(folder / "pipeline")
    assert np.array_equal(one(folder, tmp_path / "a"), whole)
    again = compose([*overrides(build_tiny_sd(tmp_path / "other", seed=9), photos, folder), *more])
    with pytest.raises(UserError, match="other settings"):
        train(again)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "own"),
    [("lora", ".lora_"), pytest.param("textual_inversion", ".added_rows", marks=pytest.mark.exhaustive)],
)
def test_a_run_with_an_adapter_is_measured_as_any(name: str, own: str, tiny_sd: Path, tmp_path: Path) -> None:
    """The best step is the adapter's; base and adapter draw again what was measured in training, to the last digit."""
    folder = tmp_path / "run"
    small = ["model.tuning.rank=2", "model.tuning.alpha=6"] if name == "lora" else ["model.tuning.embedding_lr=0.05"]
    adapter = [f"model/tuning={name}", *small, "model.optim.lr=0.05", "logger=none"]
    train(compose([*settings(tiny_sd, folder), *adapter, "trainer.max_steps=3"]))
    assert all(own in key for key in load_file(folder / "checkpoints" / "best.safetensors"))
    before = (folder / "evaluation" / "scores.jsonl").read_bytes()
    shutil.rmtree(folder / "evaluation" / "after")
    evaluate(compose([f"infer.model={folder}", "task=evaluate", *MEASURED]))
    assert (folder / "evaluation" / "scores.jsonl").read_bytes() == before
    assert not (folder / "evaluation-2").exists()
