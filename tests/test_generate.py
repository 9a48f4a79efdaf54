"""task=generate: pictures that say how they were drawn, and are never drawn over."""

import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dreambooth.config import compose
from dreambooth.errors import UserError
from dreambooth.generation import generate
from dreambooth.grid import LABEL_WIDTH, labelled_grid
from dreambooth.picture_files import TEXT_CHUNK, batches_of, describe, read_settings
from dreambooth.prompts import read_prompts
from dreambooth.sampling import scheduler_for
from tests.tiny import FACTOR, RESOLUTION, build_tiny_sd


def ask(model: object, run_dir: Path, *more: str) -> list[Path]:
    overrides = [
        f"infer.model={model}",
        f"hydra.run.dir={run_dir}",
        "infer.prompts=[a dog,'a photo, of a cat']",
        "infer.num_images_per_prompt=2",
        "infer.inference_steps=2",
        "infer.seed=3",
        "trainer.accelerator=cpu",
    ]
    return generate(compose([*overrides, *more]))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def test_numbered_pictures_say_how_to_draw_them_again_and_are_kept(tiny_sd: Path, tmp_path: Path) -> None:
    more = ("infer.negative_prompt=a photo", "infer.guidance_rescale=0.7")
    paths = ask(tiny_sd, tmp_path / "run", *more)
    folder = tmp_path / "run" / "generated"
    assert paths == [folder / f"{number:05d}.png" for number in range(4)]
    assert {path.name for path in folder.iterdir()} == {*(path.name for path in paths), "grid.png"}
    settings = read_settings(paths[3])
    assert (settings["prompt"], settings["seed"]) == ("a photo, of a cat", 3)
    assert (settings["prompt_index"], settings["picture_index"], settings["resolution"]) == (1, 1, RESOLUTION)

    # What the file says, typed into diffusers with one generator a picture, gives the picture.
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(tiny_sd)
    pipeline.scheduler = scheduler_for(pipeline.scheduler, settings["sampler_type"])
    drawn = pipeline(
        settings["prompt"],
        negative_prompt=settings["negative_prompt"],
        num_inference_steps=settings["inference_steps"],
        guidance_scale=settings["unconditional_guidance_scale"],
        guidance_rescale=settings["guidance_rescale"],
        generator=torch.Generator().manual_seed(settings["picture_seed"]),
    ).images[0]
    assert np.abs(np.asarray(drawn).astype(int) - pixels(paths[3])).max() <= 1

    # A command cut short goes on: what is there stays, what is missing comes out the same.
    kept, lost = paths[2], pixels(paths[3])
    stamp = kept.stat().st_mtime_ns
    paths[3].unlink()
    assert ask(tiny_sd, tmp_path / "run", *more) == paths
    assert kept.stat().st_mtime_ns == stamp
    assert np.array_equal(pixels(paths[3]), lost)


@pytest.mark.exhaustive
def test_other_settings_never_overwrite(tiny_sd: Path, tiny_sd_v: Path, tmp_path: Path) -> None:
    first = ask(tiny_sd, tmp_path)
    bits = [path.read_bytes() for path in first]
    assert ask(tiny_sd, tmp_path, "infer.seed=4")[0] == tmp_path / "generated-2" / "00000.png"
    assert ask(tiny_sd_v, tmp_path)[0] == tmp_path / "generated-3" / "00000.png"
    assert ask(tiny_sd, tmp_path) == first
    out = f"infer.out_path={tmp_path / 'generated'}"
    assert ask(tiny_sd, tmp_path, out) == first
    with pytest.raises(UserError, match=r"infer\.out_path: .*00000\.png"):
        ask(tiny_sd, tmp_path, out, "infer.seed=4")
    old = {name: value for name, value in read_settings(first[1]).items() if name != "guidance_rescale"}
    chunk = PngInfo()
    chunk.add_text(TEXT_CHUNK, json.dumps(old))  # as it was written before guidance could be rescaled
    with Image.open(first[1]) as picture:
        picture.save(first[1], pnginfo=chunk)
    assert ask(tiny_sd, tmp_path) == first
    with pytest.raises(UserError, match=r"infer\.out_path"):
        ask(tiny_sd, tmp_path, out, "infer.guidance_rescale=0.7")
    first[1].write_bytes(b"a picture of somebody else's")
    with pytest.raises(UserError, match=r"infer\.out_path: .*00001\.png"):
        ask(tiny_sd, tmp_path, out)
    first[1].write_bytes(bits[1])
    assert [path.read_bytes() for path in first] == bits


def test_prompts_are_one_a_list_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a dog\n\n  ein Hund, groß \n", encoding="utf-8")
    assert read_prompts("a dog, a cat") == ["a dog, a cat"]
    assert read_prompts(OmegaConf.create(["a dog", "a cat"])) == ["a dog", "a cat"]
    assert read_prompts(str(file)) == ["a dog", "ein Hund, groß"]
    assert read_prompts("word " * 200) == ["word " * 200]
    monkeypatch.setenv("HOME", str(tmp_path))
    file.write_bytes(b"\xef\xbb\xbfa dog\r\n")  # as some editors begin and end it
    assert read_prompts("~/prompts.txt") == ["a dog"]
    file.write_bytes(b"\xff\xfe\xfa")
    for nothing in ("", [], ["a dog", " "], None, str(file), str(tmp_path / "none.txt")):
        with pytest.raises(UserError, match=r"infer\.prompts"):
            read_prompts(nothing)


@pytest.mark.slow
def test_the_model_may_be_a_run_at_its_resolution(tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = compose([f"model.data.resolution={RESOLUTION + 2 * FACTOR}"])
    run.mkdir()
    OmegaConf.save(config, run / "config.yaml")
    with pytest.raises(UserError, match=r"infer\.model=.*without pipeline/"):
        ask(run, tmp_path / "here")
    build_tiny_sd(run / "pipeline")
    paths = ask(run, tmp_path / "here", "infer.prompts=a dog", "infer.num_images_per_prompt=1")
    assert paths == [run / "generated" / "00000.png"]
    assert pixels(paths[0]).shape == (RESOLUTION + 2 * FACTOR,) * 2 + (3,)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("infer.model=nowhere", r"infer\.model"),
        ("infer.model=/nowhere/at/all", r"infer\.model=/nowhere/at/all"),
        ("infer.sampler_type=DDPM", r"infer\.sampler_type"),
        ("infer.inference_steps=0", r"infer\.inference_steps"),
        ("infer.prompts=''", r"infer\.prompts"),
    ],
)
def test_mistakes_are_named(tiny_sd: Path, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        ask(tiny_sd, tmp_path / "run", override)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_grid_enlarges_by_whole_pixels_and_carries_labels() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    sheet = np.asarray(labelled_grid([[picture, picture], [picture]], ["a long label " * 9, json.dumps("ein Hund")]))
    enlarged = np.asarray(picture).repeat(3, 0).repeat(3, 1)
    for top, left in ((6, LABEL_WIDTH + 6), (6, LABEL_WIDTH + 12 + 192), (12 + 192, LABEL_WIDTH + 6)):
        assert np.array_equal(sheet[top : top + 192, left : left + 192], enlarged)
    assert (sheet[6:198, :LABEL_WIDTH] < 128).any()
    assert (sheet[204:396, :LABEL_WIDTH] < 128).any()
    large = Image.new("RGB", (300, 200))
    assert labelled_grid([[large]], [""]).size == (LABEL_WIDTH + 300 + 12, 212)


def test_the_grid_of_many_files_opens_one_at_a_time(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(60)]
    for path in paths:
        Image.new("RGB", (32, 32)).save(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 10, hard))
    try:
        assert labelled_grid([paths[:30], paths[30:]], ["a", "b"]).size == (LABEL_WIDTH + 6 + 30 * 166, 6 + 2 * 166)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
def test_a_grid_of_somebody_elses_is_never_overwritten(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    Image.new("RGB", (32, 32)).save(out / "grid.png")
    mine, one = (out / "grid.png").read_bytes(), "infer.num_images_per_prompt=1"
    with pytest.raises(UserError, match=r"infer\.out_path: .*grid\.png is of others; rename it"):
        ask(tiny_sd, tmp_path / "run", f"infer.out_path={out}", one)
    assert [path.read_bytes() for path in out.iterdir()] == [mine]
    (out / "grid.png").unlink()
    for _ in range(2):  # the grid that it made itself it makes again
        assert ask(tiny_sd, tmp_path / "run", f"infer.out_path={out}", one) == [out / "00000.png", out / "00001.png"]
    (out / "grid.png").write_bytes(mine)  # beside its pictures: from before a grid said who made it
    assert ask(tiny_sd, tmp_path / "run", f"infer.out_path={out}", one) == [out / "00000.png", out / "00001.png"]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # as if it were a very large one
    assert read_settings(out / "grid.png")["prompts"] == ["a dog", "a photo, of a cat"]


def test_pictures_are_drawn_at_once_by_prompt_or_by_batch_size() -> None:
    how = compose().infer
    wanted = [("a dog", 5), ("a cat", 1)]
    by_prompt = describe(wanted, {**how, "num_images_per_prompt": 3, "batch_size": None}, "", "", 64)
    assert batches_of(by_prompt) == [range(0, 3), range(3, 5), range(5, 6)]
    by_size = describe(wanted, {**how, "num_images_per_prompt": 3, "batch_size": 4}, "", "", 64)
    assert batches_of(by_size) == [range(0, 4), range(4, 6)]
