"""The pocket world: what it draws and says, its tokenizer and towers, and the weights that ship."""

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image

from dreambooth import UserError, compose
from dreambooth.config import command_of
from dreambooth.pocket import ENCODERS, SUBJECTS, WEIGHTS, autoencoder, encoders, eye, imagetext, judge, ready, words
from dreambooth.pocket.backgrounds import CONTEXTS
from dreambooth.pocket.denoiser import DenoiserStage
from dreambooth.pocket.figures import CLASSES
from dreambooth.pocket.pretrain import GATES, obeys, pretrain
from dreambooth.pocket.scenes import Scenes, to_float
from dreambooth.pocket.stage import Stage, fit
from dreambooth.pocket.world import COLOURS, draw, random_scene


def test_a_scene_is_a_function_of_its_seed_and_shows_what_it_says():
    assert draw(random_scene(Random(1))).tobytes() == draw(random_scene(Random(1))).tobytes()
    few, more = Scenes(3, "a"), Scenes(5, "a")
    assert torch.equal(few.pixels, more.pixels[:3])
    assert few.captions() == more.captions()[:3]
    for scene, (noun, colour, place) in zip(more.scenes, more.labels.tolist(), strict=True):
        assert scene.full_caption().endswith(CONTEXTS[list(CONTEXTS)[place]])
        assert list(CLASSES)[noun] in scene.full_caption().split()
        assert colour == -1 or list(COLOURS)[colour] in scene.full_caption().split()


def test_no_caption_has_a_word_for_a_subject():
    said = {word for variant in range(6) for caption in Scenes(400, "b").captions(variant) for word in caption.split()}
    assert not said & {*words.RARE, "spots", "stripes", "scarf", "hat"}
    for figure in ready.SUBJECTS.values():
        distance = min(sum(abs(a - b) for a, b in zip(figure.body, named, strict=True)) for named in COLOURS.values())
        assert distance > 3 * 14, "a colour that the captions name"


@pytest.mark.slow
def test_the_shipped_pictures_are_the_ready_subjects():
    assert len(ready.SUBJECTS) >= 8
    assert len({figure.noun for figure in ready.SUBJECTS.values()}) >= 5
    for name, figure in ready.SUBJECTS.items():
        for i, picture in enumerate(ready.photographs(name)):
            shipped = np.asarray(Image.open(SUBJECTS / name / f"{i}.png"), dtype=int)
            assert np.abs(shipped - np.asarray(picture, dtype=int)).mean() < 1  # another Pillow may round otherwise
        data = compose([f"model/data=pocket_{name}"]).model.data
        assert data.instance_dir == str(SUBJECTS / name)
        assert data.regularization_prompt == f"a photo of a {figure.noun}"


def test_the_tokenizer_spells_anything_and_knows_rare_words_whole():
    tokenizer = encoders.load_tokenizer()
    assert 1000 <= len(tokenizer) <= 2000
    assert tokenizer.eos_token_id == len(tokenizer) - 1  # image-text models find the end by the highest id
    for word in [*words.RARE, *words.COMMON, *CLASSES, *COLOURS]:
        assert len(tokenizer(word).input_ids) == 3, word
    for text in ("zwölf quixotic flügelhörner!", "日本の犬", "a_b-c 42"):
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids[1:-1]
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


def test_a_pretraining_keeps_the_ids_it_began_with(tmp_path):
    first = words.kept(tmp_path / "tokenizer")
    assert first.get_vocab() == words.kept(tmp_path / "tokenizer").get_vocab()
    assert first("a sks dog").input_ids == words.kept(tmp_path / "tokenizer")("a sks dog").input_ids


def test_the_text_encoder_is_the_image_text_models_tower():
    tokenizer, model = encoders.load_tokenizer(), encoders.load_imagetext()
    tokens = imagetext.tokenize(tokenizer, ["a photo of a sks dog", "", "a red teapot in the snow " * 20])
    assert tokens.shape == (3, 32)
    ours = imagetext.text_encoder(model, tokenizer)(tokens)
    projected = torch.nn.functional.normalize(ours.pooler_output @ model.text_projection, dim=-1)
    assert torch.allclose(projected, model.encode_text(tokens, normalize=True), atol=1e-5)
    shipped = DiffusionPipeline.from_pretrained(str(WEIGHTS)).text_encoder(tokens)[0]
    assert torch.allclose(shipped, ours[0], atol=2e-3)  # both were rounded to half precision on disk


class _Line(Stage):
    """Fits a line: the smallest thing a stage can train."""

    def __init__(self, steps: int):
        super().__init__("line", steps, lr=0.1, seed=0)
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.rest = torch.nn.Dropout(0.5)

    def loss(self, g: torch.Generator) -> torch.Tensor:
        x = torch.randn(8, generator=g)
        return self.rest(self.weight[0] * x + self.weight[1] - 2 * x - 1).pow(2).mean()


def test_the_rare_word_is_plain_to_the_text_tower_and_others_only_change_their_names():
    clip, tokenizer = encoders.load_imagetext(), encoders.load_tokenizer()
    before = clip.token_embedding.weight.detach().clone()
    assert imagetext.name_rare_word(clip, tokenizer) == "sks"  # as it ships
    assert torch.equal(clip.token_embedding.weight, before)
    ids = [tokenizer.convert_tokens_to_ids(f"{word}</w>") for word in ("sks", "zwx")]
    with torch.no_grad():
        clip.token_embedding.weight[ids] = before[ids[::-1]]
    changed = clip.token_embedding.weight.detach().clone()
    assert imagetext.name_rare_word(clip, tokenizer) == "zwx"
    assert torch.equal(clip.token_embedding.weight, before)
    assert not torch.equal(changed, before)


def test_a_stage_goes_on_as_if_it_had_not_stopped(tmp_path):
    whole, first, second = _Line(40), _Line(40), _Line(40)
    fit(whole, tmp_path / "whole", every_n_train_steps=10)
    fit(first, tmp_path / "parts", every_n_train_steps=10, until=20)
    fit(second, tmp_path / "parts", every_n_train_steps=10)
    assert torch.equal(whole.weight, second.weight)
    assert not torch.equal(first.weight, second.weight)


@pytest.mark.exhaustive
def test_the_average_of_the_denoiser_goes_on_too(tmp_path):
    """Its step is in the checkpoint that is saved after it."""

    class Killed(DenoiserStage):
        def loss(self, g):
            if self.global_step == 3:
                raise RuntimeError("killed")
            return super().loss(g)

    def stage(kind=DenoiserStage):
        torch.manual_seed(0)
        how = {"scale": 1.0, "tokenizer": pipe.tokenizer, "text_encoder": pipe.text_encoder, "seed": 0, "steps": 4}
        return kind(scenes, moments, batch=2, **how)

    scenes, pipe = Scenes(8, "few"), DiffusionPipeline.from_pretrained(str(WEIGHTS))
    moments = torch.randn(8, 2 * autoencoder.CHANNELS, 8, 8)
    whole, first, second = stage(), stage(Killed), stage()
    fit(whole, tmp_path / "whole", every_n_train_steps=1)
    with pytest.raises(RuntimeError, match="killed"):
        fit(first, tmp_path / "parts", every_n_train_steps=1)
    fit(second, tmp_path / "parts", every_n_train_steps=1)
    assert int(second.average.n_averaged) == int(whole.average.n_averaged) == 4
    pairs = zip(whole.average.parameters(), second.average.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_what_ships_is_small_and_its_manifest_says_how_good_it_is():
    files = [path for path in WEIGHTS.parent.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) <= 16e6
    assert sum(path.stat().st_size for path in files) <= 25e6
    manifest = json.loads((WEIGHTS.parent / "manifest.json").read_text())
    assert manifest["gates"] == GATES
    assert manifest.keys() >= {"command", "commit", "seed", "steps"}
    assert all(manifest["figures"][name] >= gate for name, gate in GATES.items())


@pytest.mark.slow
def test_the_shipped_networks_pass_their_gates_on_new_scenes():
    scenes = Scenes(200, "test")
    referee, vae = encoders.load_judge(), DiffusionPipeline.from_pretrained(str(WEIGHTS)).vae
    real = to_float(scenes.pixels)
    copies = autoencoder.reconstruct(vae, real)
    assert autoencoder.psnr(real, copies) >= GATES["psnr_db"] - 0.3
    for pixels, gate in ((real, 0.98), (copies, 0.96)):
        assert min(judge.shares(judge.verdicts(referee, pixels), scenes.labels).values()) >= gate
    assert eye.triplet_accuracy(encoders.load_eye(), eye.individuals(32, 3, "test")) >= 0.94


def test_the_marks_of_a_subject_survive_the_autoencoder():
    """The ViT finds a reconstructed photo nearer to the subject's other photos than to those of another of its class.

    The shares are those of (reconstruction, photo of its subject, photo of the other subject), as at the ViT's gate.
    """
    vae, vit = AutoencoderKL.from_pretrained(str(WEIGHTS / "vae")), encoders.load_eye()
    share = eye.marks_survive(vit, vae)
    assert GATES["marks_survive"] <= share < 1  # 0.990 of 400: two dogs and two cats
    kept = json.loads((WEIGHTS.parent / "manifest.json").read_text())["figures"]["marks_survive"]
    assert share == pytest.approx(kept, abs=0.01)
    for weight in vae.decoder.conv_out.parameters():  # gives back grey
        weight.detach().zero_()
    assert eye.marks_survive(vit, vae) < 0.7


@pytest.mark.slow
def test_the_base_draws_what_it_is_told():
    pipe = DiffusionPipeline.from_pretrained(str(WEIGHTS))
    shares, _ = obeys(pipe, encoders.load_judge(), every=17, seed="test")  # 26 prompts
    assert shares["class"] >= 0.88
    assert shares["colour"] >= 0.8
    assert shares["context"] >= 0.88


@pytest.mark.exhaustive
def test_pretrain_makes_all_that_ships(tmp_path):
    tiny = {
        "judge": 2,
        "autoencoder": 2,
        "decoder": 2,
        "imagetext": 2,
        "individuals": 16,
        "eye": 2,
        "denoiser": 2,
        "individual": 2,
    }
    steps = [f"pretrain.steps.{name}={count}" for name, count in tiny.items()]
    sizes = ["pretrain.scenes=64", "pretrain.held_out=16", "pretrain.every_nth_prompt=200"]
    refused = compose(["task=pretrain", f"pretrain.folder={tmp_path}", *steps, *sizes])
    with pytest.raises(UserError, match="gates not reached"):
        pretrain(refused)
    assert not (tmp_path / "weights").exists()
    cfg = compose(["task=pretrain", f"pretrain.folder={tmp_path}", "pretrain.ship_anyway=true", *steps, *sizes])
    out = pretrain(cfg)
    with pytest.raises(UserError, match=r"other settings \(pretrain\.seed 0 → 1; pretrain\.steps\.eye 2 → 3\)"):
        pretrain(compose([*command_of(cfg).split()[1:], "pretrain.seed=1", "pretrain.steps.eye=3"]))
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["command"] == command_of(cfg)
    assert (manifest["seed"], manifest["steps"]) == (0, tiny)
    assert manifest["commit"] or not (Path(__file__).parents[1] / ".git").exists()
    assert sorted(path.name for path in (out / "encoders").iterdir()) == sorted(p.name for p in ENCODERS.iterdir())
    published = {str(p.relative_to(WEIGHTS)) for p in WEIGHTS.rglob("*") if p.is_file()}
    assert {str(p.relative_to(out / "base")) for p in (out / "base").rglob("*") if p.is_file()} == published
    assert DiffusionPipeline.from_pretrained(str(out / "base"))("a dog", num_inference_steps=2).images[0].size == (
        64,
        64,
    )
