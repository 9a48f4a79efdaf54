"""A new word that learns, alone or with adapters: what it computes, changes, keeps and hands out."""

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from dreambooth.callbacks.checkpoint import Checkpoint
from dreambooth.callbacks.ema import Ema
from dreambooth.callbacks.export import Export
from dreambooth.config import compose
from dreambooth.errors import UserError
from dreambooth.families.sd import StableDiffusion
from dreambooth.generation import generate
from dreambooth.parallel.tensors import read
from dreambooth.picture_files import read_settings
from dreambooth.sampling import draw
from dreambooth.tasks import train
from dreambooth.tuning.pivotal import Pivotal
from dreambooth.tuning.textual_inversion import TextualInversion
from dreambooth.tuning.words import Table
from tests.steps import PROMPTS, Latents, module_of, run
from tests.test_tuning import PLAIN, Own, check_the_loss, check_the_teacher, frozen, picture
from tests.tiny import short_run

WORD = {"instance_prompt": PROMPTS["instance"], "class_prompt": PROMPTS["regularization"]}
LORA = {"rank": 2, "alpha": 3, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"], "seed": 5}
WAYS: dict[str, Any] = {
    "textual inversion": partial(TextualInversion, embedding_lr=0.05),
    "three vectors": partial(TextualInversion, embedding_lr=0.05, num_vectors=3),
    "pivotal": partial(Pivotal, embedding_lr=0.05, embedding_steps=0.6, **LORA),
    "word first": partial(Pivotal, embedding_lr=0.05, embedding_steps=1, together=False, num_vectors=2, **LORA),
}
MATRIX = [
    *((name, both, both) for name in ("textual inversion", "pivotal") for both in (0, 1)),
    *(
        pytest.param(name, one, 1 - one, marks=pytest.mark.slow)
        for name in ("textual inversion", "pivotal")
        for one in (0, 1)
    ),
    ("three vectors", 0, 1),
    ("word first", 1, 1),
]
ROWS = "text_encoder.embeddings.token_embedding.added_rows"


def tuned(family: StableDiffusion, way: str, train_text_encoder: bool = False) -> Any:
    return WAYS[way](family, **WORD)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "prior", "cached"), MATRIX)
def test_every_way(name: str, prior: bool, cached: bool, tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    make = partial(module_of, tiny_sd, tuning=partial(tuned, way=name), optim=PLAIN, prior_loss_weight=0.7)
    options: dict[str, Any] = {"prior": bool(prior), "photos": None if cached else photos}
    module, own = make(), Own()
    check_the_loss(module, bool(prior), photos=options["photos"])

    before, start = frozen(module), {key: value.clone() for key, value in module.state_dict().items()}
    assert ROWS.replace("added_rows", "weight") in before
    calls: list[pl.Callback] = [Ema(0.5), Checkpoint(1, -1), own, Export(merged=True)]
    _, rows = run(module, 3, callbacks=calls, default_root_dir=tmp_path, **options)
    assert all(row["grad_norm"] > 0 for row in rows)
    assert rows[0]["lr"] == (0.05 if name in ("textual inversion", "three vectors") else 1e-2)
    learned = {key for key in module.state_dict() if key.startswith("learned.")}
    assert learned == set(start)
    assert (learned == {f"learned.{ROWS}"}) == isinstance(module.tuning, TextualInversion)
    assert all(not torch.equal(value, module.state_dict()[key]) for key, value in start.items())
    assert before.keys() == frozen(module).keys()
    assert all(torch.equal(value, before[key]) for key, value in frozen(module).items())

    # From every step, in another process' place.
    paths = sorted((tmp_path / "checkpoints").glob("*.ckpt"))
    for step in (1, 2):
        resumed = make()
        path = tmp_path / "checkpoints" / f"step_{step:06d}.ckpt"
        _, again = run(resumed, 3, callbacks=[Ema(0.5)], resume=path, **options)
        assert again[-1]["loss"] == rows[-1]["loss"]
        assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in module.state_dict().items())
    check_when(name, start, paths)

    # What others draw with it.
    exported = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline", safety_checker=None)
    assert np.array_equal(picture(exported), own.picture)
    base = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    plain = picture(base)
    with module.tuning.untouched():
        assert np.array_equal(picture(module.family.to_pipeline()), plain)
    base.load_textual_inversion(str(tmp_path / "adapter" / "learned_embeds.safetensors"))
    if isinstance(module.tuning, Pivotal):
        base.load_lora_weights(tmp_path / "adapter", weight_name="pytorch_lora_weights.safetensors")
        assert np.abs(picture(base) - own.picture).max() <= 1
    else:
        assert np.array_equal(picture(base), own.picture)
    assert np.abs(plain - own.picture).max() > 1
    ((word, rows_of_it),) = load_file(tmp_path / "adapter" / "learned_embeds.safetensors").items()
    assert (word, rows_of_it.shape) == ("sks", (module.tuning.word.encoder.get_input_embeddings().rows.shape))


def test_a_teacher_knows_neither_word_nor_adapter(tiny_sd: Path) -> None:
    """Also where the prompt of the class has the word, which the base spells as it always did."""
    module = module_of(tiny_sd, tuning=partial(tuned, way="pivotal"), optim=PLAIN, teacher=True)
    _, rows = run(module, 3)
    assert rows[0]["prior_loss"] == pytest.approx(0, abs=1e-10)
    assert all(0 < row["prior_loss"] < 1 for row in rows[1:])
    batch = Latents(module.family, 2, 1, True, True).stream().batch(7, 0)
    own = check_the_teacher(module, StableDiffusion(str(tiny_sd)), batch)
    other = check_the_teacher(module, StableDiffusion(str(tiny_sd)), {**batch, "prompts": [PROMPTS["instance"]] * 4})
    assert not torch.equal(own, other)


def check_when(name: str, start: dict[str, torch.Tensor], paths: list[Path]) -> None:
    """What learned in which step: the word until it stops, the adapters from the first step on, or once it has."""
    weights = [start, *({f"learned.{key}": value for key, value in read(path, "weights/").items()} for path in paths)]
    for step, (old, new) in enumerate(pairwise(weights)):
        word = name in ("textual inversion", "three vectors") or step < (2 if name == "pivotal" else 1)
        assert torch.equal(old[f"learned.{ROWS}"], new[f"learned.{ROWS}"]) != word, step
        later = [not torch.equal(old[key], new[key]) for key in start if ".lora_B." in key]
        assert all(value == (name == "pivotal" or step > 0) for value in later), step
    moments = sum(value.numel() for value in read(paths[0], "optimizer/").values())
    if name == "textual inversion":
        assert moments == 2 * start[f"learned.{ROWS}"].numel() + 1  # Adam's two, and its count of steps


def test_a_table_of_which_some_rows_learn() -> None:
    """It reads as one table, and only the rows get a gradient; rows that the table had to spare are replaced."""
    table, tokens = nn.Embedding(9, 4), torch.tensor([[0, 6, 3], [7, 8, 5]])
    table.requires_grad_(False)
    mixed = Table(table, 6, torch.randn(2, 4))
    whole = mixed.plain()
    assert torch.equal(whole(tokens), mixed(tokens))
    assert torch.equal(whole.weight[[0, 1, 2, 3, 4, 5, 8]], table.weight[[0, 1, 2, 3, 4, 5, 8]])
    mixed(tokens).sum().backward()
    assert torch.equal(mixed.rows.grad, torch.ones(2, 4))
    assert table.weight.grad is None
    assert Table(table, 9, torch.randn(3, 4)).plain().num_embeddings == 12


def test_the_word_is_merged_once_and_forgotten_without_a_trace(tiny_sd: Path) -> None:
    family, plain = StableDiffusion(str(tiny_sd)), StableDiffusion(str(tiny_sd))
    tuning = tuned(family, "word first")
    for weight in tuning.weights().values():
        weight.data += 0.1
    unmerged = picture(family.to_pipeline())
    with tuning.merged(), tuning.merged():
        assert family.networks["text_encoder"].config.vocab_size == len(plain.tokenizer) + 2
        assert np.abs(picture(family.to_pipeline()) - unmerged).max() <= 1
        assert family.fingerprint(fresh=True) != plain.fingerprint()
    assert family.networks["text_encoder"].config.vocab_size == len(plain.tokenizer)
    assert family.fingerprint(fresh=True) == family.fingerprint() == plain.fingerprint()
    with tuning.untouched():
        assert np.array_equal(picture(family.to_pipeline()), picture(plain.to_pipeline()))
    assert torch.equal(family.token_ids(["a dog"]), plain.token_ids(["a dog"]))
    assert family.token_ids(["sks dog"])[0, 1:3].tolist() == [len(plain.tokenizer), len(plain.tokenizer) + 1]


def test_it_begins_as_the_initializer(tiny_sd: Path) -> None:
    family = StableDiffusion(str(tiny_sd))
    table = family.text_encoder.get_input_embeddings().weight
    (rows,) = tuned(family, "three vectors").weights().values()
    dog, photo = (family.tokenizer(word, add_special_tokens=False).input_ids for word in ("dog", "photo"))
    assert torch.equal(rows, table[dog * 3])
    other = TextualInversion(StableDiffusion(str(tiny_sd)), **WORD, initializer_token="photo")
    assert torch.equal(next(iter(other.weights().values())), table[photo])


def test_recomputed_activations_change_nothing(tiny_sd: Path) -> None:
    make = partial(module_of, tiny_sd, tuning=partial(tuned, way="textual inversion"), optim=PLAIN)
    rows = [run(make(gradient_checkpointing=less), 2)[1] for less in (False, True)]
    assert rows[1][-1] == pytest.approx(rows[0][-1], rel=1e-4, nan_ok=True)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"instance_prompt": "a photo of dog"}, "has no word that"),
        ({"instance_prompt": "a photo of my sks dog"}, "which of 'my sks' learns.*model.tuning.placeholder_token=my"),
        ({"placeholder_token": "xyz"}, "model.tuning.placeholder_token=xyz.*does not have it"),
        ({"instance_prompt": "a photo of do dog"}, "has 'do' as a token already.*such as sks or <do>"),
        ({"class_prompt": "a photo of cat dog", "initializer_token": "cat"}, "initializer_token: 'cat' is 3 tokens"),
        ({"class_prompt": "", "placeholder_token": "sks"}, "initializer_token: '' is 0 tokens"),
    ],
)
def test_wrong_words_are_one_line(given: dict[str, str], words: str, tiny_sd: Path) -> None:
    with pytest.raises(UserError, match=words) as caught:
        TextualInversion(StableDiffusion(str(tiny_sd)), **{**WORD, "placeholder_token": None, **given})
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_what_cannot_be_tuned_so_is_one_line(tiny_sd: Path) -> None:
    family = StableDiffusion(str(tiny_sd))
    with pytest.raises(UserError, match="the adapters wait for ever"):
        Pivotal(family, **WORD, embedding_steps=None, together=False, **LORA)
    family.networks["text_encoder_2"] = family.text_encoder
    with pytest.raises(UserError, match="2 text encoders"):
        tuned(family, "pivotal")
    for name in ("textual_inversion", "pivotal"):
        with pytest.raises(UserError, match=r"model\.train_text_encoder: one new word learns"):
            compose([f"model/tuning={name}", "model.train_text_encoder=true"])
    with pytest.raises(UserError, match=r"model\.data\.subjects: one new word learns"):
        compose(["model/tuning=textual_inversion", "model/data=pocket_two"])
    for wrong in ("num_vectors=0", "embedding_lr=0", "embedding_steps=0"):
        with pytest.raises(UserError, match=f"model.tuning.{wrong}"):
            compose(["model/tuning=pivotal", f"model.tuning.{wrong}"])


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["textual_inversion", "pivotal"])
def test_a_run_and_its_pictures(name: str, tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    """The task trains; task=generate draws what plain diffusers draws with the files, and refuses another model."""
    settings = [f"model/tuning={name}", *short_run(tiny_sd, photos, tmp_path / "run"), "model.tuning.embedding_lr=0.5"]
    off = ["callbacks.sample_grid=null", "callbacks.evaluate=null", "logger=none", "trainer.max_steps=2"]
    cfg = compose([*settings, *off, "model.tuning.num_vectors=2"])
    folder = train(cfg).folder
    assert (cfg.model.with_prior_preservation, (folder / "pipeline").exists()) == (False, False)

    ask = ["infer.prompts=a photo of sks dog", "infer.num_images_per_prompt=1", "infer.inference_steps=2"]
    ask += ["infer.unconditional_guidance_scale=4"]

    def drawn(out: str, *more: str) -> np.ndarray:
        path = generate(compose([*ask, f"infer.out_path={tmp_path / out}", "trainer.accelerator=cpu", *more]))[0]
        seeds.append(read_settings(path)["picture_seed"])
        return np.asarray(Image.open(path).convert("RGB")).astype(int)

    seeds: list[int] = []
    ours, plain = drawn("ours", f"infer.model={folder}"), drawn("plain", f"infer.model={tiny_sd}")
    assert np.abs(ours - plain).max() > 1
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    pipeline.load_textual_inversion(str(folder / "adapter"))
    if name == "pivotal":
        pipeline.load_lora_weights(folder / "adapter", weight_name="pytorch_lora_weights.safetensors")
    how: dict[str, Any] = {"steps": 2, "guidance": 4.0, "sampler_type": "DDIM", "resolution": 32}
    alone = np.asarray(draw(pipeline, [PROMPTS["instance"]], seeds[:1], **how)[0]).astype(int)
    assert np.abs(alone - ours).max() <= 1
    switches = ("infer.adapter_text_encoder=false", "infer.adapter_denoiser=false")
    assert np.array_equal(drawn("off", f"infer.model={folder}", *switches), plain)
    if name == "textual_inversion":
        word = f"infer.adapter={folder / 'adapter' / 'learned_embeds.safetensors'}"
        assert np.array_equal(drawn("word", f"infer.model={tiny_sd}", word), ours)
        save_file({"sks": torch.zeros(1, 5)}, tmp_path / "narrow.safetensors")
        with pytest.raises(UserError, match=r"narrow\.safetensors does not go with"):
            drawn("narrow", f"infer.model={tiny_sd}", f"infer.adapter={tmp_path / 'narrow.safetensors'}")
