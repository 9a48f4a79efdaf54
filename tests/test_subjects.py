"""Several subjects in one model: turns, classes, caches, measures, and that one of them is what it always was."""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from dreambooth import UserError, compose, config, train
from dreambooth.data.pairs import Role
from dreambooth.data.sources import prompts_of_each
from dreambooth.families.sd import StableDiffusion
from dreambooth.metrics import measure
from dreambooth.metrics.measure import read_scores
from dreambooth.report.read import read_run
from tests.steps import trained
from tests.test_captions import write_sidecars
from tests.test_datamodule import beside, data, files, ready
from tests.test_masks import write_masks
from tests.test_pairs import ROLES, role, same, stream
from tests.tiny import short_run

DOG, TEAPOT = "a photo of a sks dog", "a photo of a zwx teapot"


@pytest.fixture(scope="module")
def tiny(tiny_sd: Path) -> StableDiffusion:
    return StableDiffusion(str(tiny_sd))


@pytest.fixture
def two(photos: Path) -> list[dict[str, str]]:
    """A dog of five photos and a teapot of three."""
    dog, teapot = beside(photos, "dog"), beside(photos, "teapot")
    for name in ("0.png", "1.jpg"):
        (teapot / name).unlink()
    return [
        {"instance_dir": str(dog), "instance_prompt": DOG, "regularization_prompt": "a photo of a dog"},
        {"instance_dir": str(teapot), "instance_prompt": TEAPOT, "regularization_prompt": "a photo of a teapot"},
    ]


def counted(**more: Any) -> Counter[str]:
    """How often each picture comes in 60 positions: three subjects of 2, 3 and 5 photos, two of them of one class."""
    shared, other = role("regularization", 5), role("regularization 1", 4)
    subjects = [[role("instance", 2), shared], [role("instance 1", 3), other], [role("instance 2", 5), shared]]
    batches = list(islice(stream(*subjects, **more), 60 // (more["micro_batch_size"])))
    return Counter(path for batch in batches for path in batch["paths"])


def test_subjects_take_turns_and_share_the_pictures_of_a_class() -> None:
    """20 turns each: 10 of each of 2 photos, 4 of each of 5; the shared class has 40 turns over its 5 pictures."""
    seen = counted(micro_batch_size=3)
    assert {seen[f"instance/{n}.png"] for n in range(2)} == {10}
    assert sum(seen[f"instance 1/{n}.png"] for n in range(3)) == 20
    assert {seen[f"instance 2/{n}.png"] for n in range(5)} == {4}
    assert {seen[f"regularization/{n}.png"] for n in range(5)} == {8}
    assert {seen[f"regularization 1/{n}.png"] for n in range(4)} == {5}
    for step, batch in enumerate(islice(stream([role("instance", 2)], [role("instance 1", 3)]), 6)):
        assert [Path(path).parent.name for path in batch["paths"]] == ["instance", "instance 1"], step


def test_a_subject_s_class_picture_stands_at_its_own_position() -> None:
    subjects = [[role("instance", 2), role("regularization", 5)], [role("instance 1", 3), role("regularization 1", 4)]]
    for batch in islice(stream(*subjects, micro_batch_size=3), 5):
        names = [Path(path).parent.name for path in batch["paths"]]
        assert [name.replace("regularization", "instance") for name in names[3:]] == names[:3]


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 3), (3, 2)])
def test_the_turns_are_the_same_at_any_world_size(world: int, accumulate: int) -> None:
    subjects = [ROLES, [role("instance 1", 3), role("regularization 1", 4)]]
    size = world * accumulate
    for step in range(4):
        whole = stream(*subjects, micro_batch_size=size).batch(step, 0)
        parts = [
            stream(*subjects, micro_batch_size=1, world=world, rank=rank, accumulate=accumulate).batch(step, micro)
            for micro in range(accumulate)
            for rank in range(world)
        ]
        assert [part["paths"][half] for half in (0, 1) for part in parts] == whole["paths"]
        assert torch.equal(
            torch.cat([part["moments"][half : half + 1] for half in (0, 1) for part in parts]), whole["moments"]
        )


def test_each_subject_has_its_photos_prompt_class_and_cache(tiny: StableDiffusion, two: list, tmp_path: Path) -> None:
    more = {"subjects": two, "regularization_dir": str(tmp_path / "reg"), "micro_batch_size": 2}
    module = ready(tiny, Path("unused"), **more)
    counts = (5 + 3, 12, 12, 8 + 12)
    names = ("num_instance", "num_regularization", "regularization_generated", "latents_encoded")
    assert tuple(module.counts[name] for name in names) == counts
    assert (tmp_path / "reg/a-photo-of-a-dog/manifest.json").exists()
    assert len(list((tmp_path / "reg/a-photo-of-a-teapot").glob("*.png"))) == 6
    assert len(list(Path(f"{two[1]['instance_dir']}_cached").glob("*.pt"))) == 3 + 1
    assert module.epoch_size == 8
    for batch in islice(module.train_dataloader(), 5):
        assert batch["prompts"] == [DOG, TEAPOT, "a photo of a dog", "a photo of a teapot"]
        wanted = [two[0]["instance_dir"], two[1]["instance_dir"], f"{tmp_path}/reg/a-photo-of-a-dog"]
        assert [str(Path(path).parent) for path in batch["paths"]][:3] == wanted
        for number, prompt in enumerate(batch["prompts"]):
            assert torch.equal(
                batch["cond"]["prompt_embeds"][number], tiny.encode_prompts([prompt])["prompt_embeds"][0]
            )
    assert ready(tiny, Path("unused"), **more).counts["latents_encoded"] == 0
    of_one_class = [two[0], {**two[1], "regularization_prompt": "a photo of a dog"}]
    shared = ready(tiny, Path("unused"), **{**more, "subjects": of_one_class})
    assert shared.ready[0].subjects[0][1] is shared.ready[0].subjects[1][1]
    assert shared.counts["num_regularization"] == 6


def test_one_subject_in_a_list_is_the_subject_alone(tiny: StableDiffusion, photos: Path) -> None:
    alone = ready(tiny, photos, regularization_dir=str(photos.parent / "reg/a-photo-of-a-dog"))
    one = {"instance_dir": str(photos), "instance_prompt": DOG, "regularization_prompt": "a photo of a dog"}
    before = files(photos.parent)
    listed = ready(tiny, Path("unused"), subjects=[one], regularization_dir=str(photos.parent / "reg"))
    assert files(photos.parent) == before
    for a, b in zip(islice(alone.train_dataloader(), 9), listed.train_dataloader(), strict=False):
        assert same(a, b)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"instance_dri": "x"}, r"subjects\[1\]\.instance_dri: there is no such key; did you mean 'instance_dir'"),
        ({"instance_dir": ""}, r"subjects\[1\]\.instance_dir is not set; each subject names instance_dir, instance_pr"),
        ({"regularization_prompt": None}, r"subjects\[1\]\.regularization_prompt is not set"),
        ({"instance_prompt": DOG}, r"subjects\[1\]\.instance_prompt='a photo of a sks dog' is another's"),
        ("teapot", r"subjects\[1\]=teapot: must hold the keys instance_dir"),
    ],
)
def test_a_wrong_list_is_one_line(two: list, entry: Any, words: str) -> None:
    second = {**two[1], **entry} if isinstance(entry, dict) else entry
    entries = [listed(two[0]), listed(second) if isinstance(second, dict) else second]
    with pytest.raises(UserError, match=words) as error:
        compose(["model/data=subjects", f"model.data.subjects=[{','.join(entries)}]"])
    assert "\n" not in str(error.value)


def test_a_card_without_its_list_says_so() -> None:
    with pytest.raises(UserError, match=r"model\.data\.subjects is empty; list them"):
        compose(["model/data=subjects"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"instance_dir": "dog"}, r"subjects\[1\]\.instance_dir: .* is another subject's"),
        (
            {"regularization_dir": "reg/a-photo-of-a-dog"},
            r"subjects\[1\]\.regularization_dir: .* of 'a photo of a dog'",
        ),
        ({"regularization_dir": "dog"}, r"subjects\[1\]\.regularization_dir: .* holds the subject"),
        ({"instance_dir": "nowhere"}, r"subjects\[1\]\.instance_dir: cannot open"),
    ],
)
def test_folders_that_two_cannot_share_are_refused(
    tiny: StableDiffusion, two: list, tmp_path: Path, change: dict[str, str], words: str
) -> None:
    places = {"dog": two[0]["instance_dir"]}
    ((key, value),) = change.items()
    second = {**two[1], key: places.get(value, str(tmp_path / value))}
    before = files(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        data(tiny, Path("unused"), subjects=[two[0], second], regularization_dir=str(tmp_path / "reg")).check()
    assert "\n" not in str(error.value)
    assert files(tmp_path) == before


def run_settings(tiny_sd: Path, folder: Path, *more: str) -> list[str]:
    """The card of the two shipped subjects with the tiny model."""
    own = [one for one in short_run(tiny_sd, Path("unused"), folder) if "instance_dir=unused" not in one]
    return [
        "model/data=pocket_two",
        *own,
        f"model.data.regularization_dir={folder.parent / 'reg'}",
        "model.with_prior_preservation=true",
        "model.data.num_reg_images=2",
        "model.data.sampler.inference_steps=1",
        "callbacks.sample_grid=null",
        *more,
    ]


@pytest.mark.slow
def test_two_subjects_are_measured_each_with_its_photos(tiny_sd: Path, tmp_path: Path) -> None:
    more = ["evaluate.prompts=[a photo of a sks dog,a drawing of a sks dog at night]", "evaluate.inference_steps=1"]
    more += ["evaluate.num_images_per_prompt=2", "evaluate.num_class_images=1", "trainer.max_steps=2"]
    more += ["callbacks.evaluate.num_images_per_prompt=1", "callbacks.evaluate.num_class_images=1"]
    run = train(compose(run_settings(tiny_sd, tmp_path / "run", *more)))
    metrics, rows = run.summary["metrics"], read_scores(run.folder / "evaluation/scores.jsonl")
    assert set(metrics["subjects"]) == {"dog", "teapot"}
    drawn = [row for row in rows if row["set"] == "after" and row["role"] == "subject"]
    assert [row["prompt"] for row in drawn][::2] == [
        *(DOG, "a drawing of a sks dog at night"),
        *(TEAPOT, "a drawing of a zwx teapot at night"),
    ]
    assert [row["prompt"] for row in rows if row["set"] == "after" and row["role"] == "class"] == [
        "a photo of a dog",
        "a photo of a teapot",
    ]
    for name in ("dog", "teapot"):
        own = [row for row in drawn if row["subject"] == name]
        assert all(row["nearest"].startswith(f"{name}/") for row in own)
        assert metrics["subjects"][name]["after"]["dino"] == pytest.approx(sum(row["dino"] for row in own) / 4)
        assert metrics["subjects"][name]["real"]["dino"] is not None
    mean = sum(metrics["subjects"][name]["after"]["clip_t"] for name in ("dog", "teapot")) / 2
    assert metrics["after"]["clip_t"] == pytest.approx(mean)
    assert "teapot\n  dino" in measure.table(metrics)
    found = read_run(run.folder)
    assert {row["nearest"] for row in drawn} <= set(found.judges)
    assert len(found.photos) == 10
    assert (run.folder / "report.html").exists()


def test_samples_show_every_subject_and_every_class_once() -> None:
    words = ("instance_prompt", "regularization_prompt")
    dog, pot, cat = (
        dict(zip(words, pair, strict=True)) for pair in ((DOG, "a dog"), (TEAPOT, "a pot"), ("a zwx dog", "a dog"))
    )
    asked = [DOG, "a sks dog at night", "a dog", "the moon"]
    assert prompts_of_each(asked, [dog, pot, cat]) == [
        *asked,
        *(TEAPOT, "a zwx teapot at night", "a pot"),
        *("a zwx dog", "a zwx dog at night"),
    ]
    assert prompts_of_each(asked, None) == prompts_of_each(asked, [dog]) == asked
    cfg = compose(["model/data=pocket_two"])
    assert len(config.build(cfg.callbacks.sample_grid)(cfg).prompts) == 2 * len(cfg.callbacks.sample_grid.prompts)


@pytest.mark.parametrize("batch_size", [1, 3, 28])
def test_samples_are_the_same_however_many_are_drawn_at_once(tiny: StableDiffusion, batch_size: int) -> None:
    cfg = compose(["callbacks.sample_grid.inference_steps=2", "callbacks.sample_grid.resolution=16"])
    grids = []
    for size in (None, batch_size):
        node = OmegaConf.merge(cfg.callbacks.sample_grid, {"batch_size": size, "prompts": [DOG, "a dog", "the moon"]})
        grids.append(np.array([[np.array(one) for one in row] for row in config.build(node)(cfg)._draw(tiny)], int))
    assert grids[0].shape[:2] == (3, cfg.callbacks.sample_grid.num_images_per_prompt)
    assert np.abs(grids[0] - grids[1]).max() <= 1


def test_a_prompt_that_the_others_cannot_be_asked_is_refused(tiny_sd: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate\.prompts: 'a dog on the moon' lacks 'a sks dog'"):
        train(compose(run_settings(tiny_sd, tmp_path / "run", "evaluate.prompts=[a dog on the moon]")))
    assert not (tmp_path / "run").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize(("cached", "text"), [(True, False), (False, True)])
def test_everything_at_once_resumes_bit_for_bit(
    tiny_sd: Path, two: list, tmp_path: Path, cached: bool, text: bool
) -> None:
    """Two subjects with captions that drop out, masks, buckets and random crops, with the prior."""
    for subject in two:
        write_sidecars(Path(subject["instance_dir"]))
        write_masks(Path(subject["instance_dir"]))
    settings = run_settings(tiny_sd, tmp_path / "run")
    settings += [f"model.data.subjects=[{','.join(map(listed, two))}]", "model.data.cached_instance_dir=null"]
    settings += ["model.data.captions=sidecar", "model.data.caption_dropout=0.3", "model.data.masks=files"]
    settings += ["model.data.buckets=true", "model.data.center_crop=false", "model.data.cached_variants=2"]
    settings += [f"model.use_cached_latents={cached}", f"model.train_text_encoder={text}", "model.micro_batch_size=1"]
    broken = [trained(steps, *settings, f"hydra.run.dir={tmp_path / 'broken'}") for steps in (2, 6)][-1]
    whole = trained(6, *settings, f"hydra.run.dir={tmp_path / 'whole'}")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def listed(subject: dict[str, Any]) -> str:
    """A subject as the command line has it."""
    pairs = (f"{key}:{'null' if value is None else repr(value)}" for key, value in subject.items())
    return "{" + ",".join(pairs) + "}"


def test_the_role_of_one_subject_is_named_as_before(tiny: StableDiffusion, photos: Path) -> None:
    module = ready(tiny, photos)
    assert [one.name for one in module.ready[0].subjects[0]] == ["instance", "regularization"]
    assert all(isinstance(one, Role) for one in module.ready[0].subjects[0])
