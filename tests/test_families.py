"""The contract of families: one test file over all of them, each built tiny."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from dreambooth import sampling
from dreambooth.errors import UserError
from dreambooth.families.base import Family
from dreambooth.families.sd import StableDiffusion
from dreambooth.objective import Diffusion
from dreambooth.tuning.full import Full
from tests.tiny import build_tiny_sd

PROMPTS = ["a photo of a sks dog", ""]


@pytest.fixture(params=["tiny_sd", "tiny_sd_v"])
def family(request: pytest.FixtureRequest) -> Family:
    return StableDiffusion(str(request.getfixturevalue(request.param)))


def states(family: Family) -> dict[str, tuple]:
    """What sampling and saving must leave alone."""
    return {
        name: (network.training, next(network.parameters()).dtype, [p.requires_grad for p in network.parameters()])
        for name, network in family.networks.items()
    }


def draw(pipeline: DiffusionPipeline, **options: object) -> np.ndarray:
    g = torch.Generator().manual_seed(0)
    return pipeline("a dog", num_inference_steps=2, generator=g, output_type="np", **options).images[0]


def test_shapes_and_gradients(family):
    """Pictures to moments to latents to a prediction, and gradients in exactly what learns."""
    size, factor = 8 * family.vae_scale_factor, family.vae_scale_factor
    moments = family.encode_pictures(torch.rand(2, 3, size, size) * 2 - 1)
    assert moments.shape[0] == 2
    assert moments.shape[2:] == (size // factor, size // factor)
    assert moments.dtype == torch.float32
    assert not moments.requires_grad
    noise = torch.randn(2, moments.shape[1] // 2, *moments.shape[2:])
    x0 = family.sample_latents(moments, noise)
    learned = Full(family).learned
    cond = family.encode_prompts(PROMPTS)
    assert all(len(value) == 2 and not value.requires_grad for value in cond.values())
    t = torch.tensor([10, 900])
    objective = Diffusion.from_scheduler(family.scheduler)
    pred = family.denoise(objective.add_noise(x0, noise, t), t, cond)
    assert pred.shape == x0.shape
    objective.loss(pred, objective.target(x0, noise, t), t).mean().backward()
    for name, network in family.networks.items():
        assert any(p.grad is not None for p in network.parameters()) == (name in learned)


def test_agrees_with_its_pipeline(family):
    """Embeddings, latents and the side of a picture are what diffusers' own pipeline computes."""
    pipeline = family.to_pipeline()
    assert draw(pipeline).shape == (family.default_resolution, family.default_resolution, 3)
    embeds, _ = pipeline.encode_prompt("a dog", "cpu", 1, False)
    torch.testing.assert_close(family.encode_prompts(["a dog"])["prompt_embeds"], embeds)
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    posterior = pipeline.vae.encode(pixels).latent_dist
    z = torch.randn_like(posterior.mean)
    expected = (posterior.mean + posterior.std * z) * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(family.sample_latents(family.encode_pictures(pixels), z), expected)


def test_tuning_full(family):
    learned = Full(family, train_text_encoder=True).learned
    assert set(learned) == set(family.trainable_networks())
    assert all(network.training for network in learned.values())
    assert list(Full(family).learned) == [name for name in learned if not name.startswith("text_encoder")]
    assert not family.networks["text_encoder"].training
    assert not any(p.requires_grad for p in family.networks["text_encoder"].parameters())


def test_sampling_shares_the_networks_and_leaves_them_alone(family):
    Full(family)
    before = states(family)
    pipeline = family.to_pipeline()
    assert all(getattr(pipeline, name) is network for name, network in family.networks.items())
    first = draw(pipeline)
    np.testing.assert_array_equal(first, draw(family.to_pipeline()))
    assert states(family) == before
    assert pipeline.scheduler is not family.to_pipeline().scheduler


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_export_loads_and_draws_without_us(family, tmp_path, dtype):
    """What is saved is what is loaded: same keys as the base, same picture, float32 everywhere when loaded plainly."""
    base, folder = Path(family.source), tmp_path / "pipeline"
    before = states(family)
    for _ in range(2):  # over an older export, too
        family.save(folder, dtype)
    assert states(family) == before
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]
    files = {str(path.relative_to(folder)) for path in folder.rglob("*.*")}
    assert files == {str(path.relative_to(base)) for path in base.rglob("*.*")}
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert {p.dtype for name in family.networks for p in getattr(pipeline, name).parameters()} == {torch.float32}
    tolerance = {"rtol": 0, "atol": 0 if dtype is None else 0.05}
    np.testing.assert_allclose(draw(pipeline), draw(family.to_pipeline()), **tolerance)
    again = type(family)(str(folder))
    assert (again.fingerprint() == family.fingerprint()) == (dtype is None)


def test_published_names(tiny_sd, tmp_path):
    """The text encoder keeps the names under which every hub folder has it, whatever the library calls them inside."""
    StableDiffusion(str(tiny_sd)).save(tmp_path / "out")
    for name in ("text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"):
        base, ours = (load_file(folder / f"{name}.safetensors") for folder in (tiny_sd, tmp_path / "out"))
        assert base.keys() == ours.keys()
    assert all(key.startswith("text_model.") for key in load_file(tmp_path / "out/text_encoder/model.safetensors"))


def test_fingerprint_is_of_the_untouched_weights(tiny_sd):
    family, other = StableDiffusion(str(tiny_sd)), StableDiffusion(str(tiny_sd))
    whole, vae = family.fingerprint(), family.fingerprint("vae")
    with torch.no_grad():
        next(family.unet.parameters()).add_(1)
        next(other.unet.parameters()).add_(1)
    assert (family.fingerprint(), family.fingerprint("vae")) == (whole, vae)
    assert other.fingerprint("vae") == vae
    assert other.fingerprint() != whole


def test_variant_only_folder_loads_unasked(tmp_path):
    """A folder that holds only fp16 files loads in float32 without a word, and its export has plain names."""
    folder = build_tiny_sd(tmp_path / "fp16", variant="fp16", dtype=torch.float16)
    family = StableDiffusion(str(folder))
    assert {p.dtype for network in family.networks.values() for p in network.parameters()} == {torch.float32}
    family.save(tmp_path / "out", torch.float16)
    assert draw(DiffusionPipeline.from_pretrained(tmp_path / "out")).shape == (32, 32, 3)


def test_plain_files_are_preferred_and_a_named_variant_obeyed(tiny_sd, tmp_path):
    folder = shutil.copytree(tiny_sd, tmp_path / "both")
    other = build_tiny_sd(tmp_path / "fp16", seed=5, variant="fp16", dtype=torch.float16)
    for path in other.rglob("*.fp16.safetensors"):
        shutil.copy(path, folder / path.relative_to(other))
    plain = StableDiffusion(str(tiny_sd)).fingerprint()
    assert StableDiffusion(str(folder)).fingerprint() == plain
    assert StableDiffusion(str(folder), variant="fp16").fingerprint() != plain


@pytest.mark.parametrize("where", ["training", "drawing"])
def test_a_prompt_that_is_cut_says_once_what_was_lost(tiny_sd, caplog, where):
    """The window of 32 holds 30 tokens beside its marks; here a letter is a token, but for "photo" and "dog"."""
    family = StableDiffusion(str(tiny_sd))
    fits, long = where[0] * 30, f"a photo of a {where[0] * 26} dog on the moon"
    for _ in range(2):
        if where == "training":
            family.encode_prompts([fits, long, long])
        else:
            asked = {"steps": 1, "guidance": 3.0, "sampler_type": "DDIM", "resolution": 32}
            sampling.draw(family.to_pipeline(), [long] * 2, [1, 2], negative_prompt=long, **asked)
    assert [record.getMessage() for record in caplog.records] == [
        f"The model reads 32 tokens of a prompt; not read: 'dog on the moon', the end of '{long}'"
    ]


def spoil(folder: Path, what: str) -> None:
    if what == "another pipeline":
        index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": "StableDiffusionXLPipeline"}
        (folder / "model_index.json").write_text(json.dumps(index))
    elif what == "no index":
        (folder / "model_index.json").unlink()
    elif what == "no vae":
        shutil.rmtree(folder / "vae")
    elif what == "pickled":
        weights = folder / "unet/diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_suffix(".bin"))
    elif what == "cut short":
        weights = folder / "text_encoder/model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif what == "a weight missing":
        path = folder / "unet/diffusion_pytorch_model.safetensors"
        save_file(dict(list(load_file(path).items())[1:]), path, {"format": "pt"})


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("another pipeline", "_class_name is StableDiffusionXLPipeline, this family needs StableDiffusionPipeline"),
        ("no index", "model_index.json cannot be read"),
        ("no vae", "has no folder 'vae'"),
        ("pickled", "only pickled weights .*never opened.*save_pretrained"),
        ("cut short", "text_encoder cannot be loaded"),
        ("a weight missing", "lacks 1 weights, such as"),
    ],
)
def test_broken_folders_are_refused_in_one_line(tiny_sd, tmp_path, what, message):
    folder = shutil.copytree(tiny_sd, tmp_path / "broken")
    spoil(folder, what)
    with pytest.raises(UserError, match=message) as error:
        StableDiffusion(str(folder))
    assert "\n" not in str(error.value)


def test_hub_ids_load_from_the_cache_of_the_hub(tmp_path, monkeypatch):
    """Offline, a hub id is what an earlier download left; an unknown revision is said."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--owner--tiny"
    build_tiny_sd(model / "snapshots" / ("a" * 40))
    (model / "refs").mkdir()
    (model / "refs/main").write_text("a" * 40)
    assert StableDiffusion("owner/tiny").source == "owner/tiny"
    with pytest.raises(UserError, match=r"owner/tiny.*revision nope"):
        StableDiffusion("owner/tiny", revision="nope")


@pytest.mark.parametrize("source", ["./missing", "/no/such/folder", "~/missing", "missing", "a/b/c", "owner/name"])
def test_unknown_models_are_refused_in_one_line(source):
    with pytest.raises(UserError, match=source) as error:
        StableDiffusion(source)
    assert "\n" not in str(error.value)
    assert "type" in str(error.value)
