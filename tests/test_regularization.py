"""The same set of class pictures from any number of ranks and interruptions, and nobody's pictures touched."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from dreambooth.data.regularization import MANIFEST, fill, inspect, plan
from dreambooth.errors import UserError
from dreambooth.sampling import SAMPLERS, draw, scheduler_for
from tests.processes import FORK_WARNING, kill_after, start

NUMBER, CHUNK = 46, 4


@pytest.fixture(scope="module")
def pipeline(tiny_sd: Path) -> StableDiffusionPipeline:
    """The untouched model that draws."""
    return StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)


def settings(**changes: Any) -> dict[str, Any]:
    """What the pictures of these tests depend on."""
    sampler = {
        "sampler_type": "DDIM",
        "inference_steps": 2,
        "unconditional_guidance_scale": 3.0,
        "guidance_rescale": 0.0,
    }
    rest = {"base": "b", "prompt": "a dog", "seed": 1, "resolution": 32, "num_images_per_prompt": CHUNK}
    return {**rest, **sampler, **changes}


def never() -> None:
    raise AssertionError("nothing is missing, so no model is needed")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def complete(pipeline: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The set as one process draws it in one go."""
    folder = tmp_path_factory.mktemp("complete")
    assert fill(lambda: pipeline, folder, NUMBER, settings()) == NUMBER
    return contents(folder)


def restore(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def test_a_set_is_named_described_and_not_drawn_twice(complete: dict[str, bytes], tmp_path: Path) -> None:
    assert sorted(complete) == [f"{index:05d}.png" for index in range(NUMBER)] + [MANIFEST]
    manifest = json.loads(complete[MANIFEST])
    assert manifest == {**settings(), "slots": list(range(NUMBER))}
    assert len(set(complete.values())) == NUMBER + 1
    restore(tmp_path, complete)
    assert fill(never, tmp_path, NUMBER, settings()) == 0
    assert fill(never, tmp_path, NUMBER - 3, settings()) == 0
    assert contents(tmp_path) == complete


def test_missing_and_broken_slots_come_back_bit_for_bit(
    complete: dict[str, bytes], pipeline: StableDiffusionPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    restore(tmp_path, complete)
    (tmp_path / "00002.png").unlink()
    (tmp_path / "00005.png").write_bytes(complete["00005.png"][:200])
    (tmp_path / "00045.png").write_bytes(b"")
    with caplog.at_level(logging.INFO):
        assert fill(lambda: pipeline, tmp_path, NUMBER, settings()) == 3
    assert contents(tmp_path) == complete
    assert "missing or broken: 3 pictures" in caplog.text


def test_a_larger_set_begins_with_the_smaller_and_keeps_its_seed(
    complete: dict[str, bytes], pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    assert fill(lambda: pipeline, tmp_path, 3, settings()) == 3
    assert fill(lambda: pipeline, tmp_path, NUMBER, settings(seed=2)) == NUMBER - 3
    assert contents(tmp_path) == complete


def test_who_comes_while_a_set_is_drawn_waits_and_goes_on_with_it(
    complete: dict[str, bytes], pipeline: StableDiffusionPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another seed would else take the manifest over before the first picture is there, and mix two sets."""
    begun, enough = Event(), Event()

    def slowly() -> StableDiffusionPipeline:
        begun.set()
        assert enough.wait(30)
        return pipeline

    caplog.set_level(logging.INFO)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(fill, slowly, tmp_path / "set", 3, settings())
        assert begun.wait(30)
        second = pool.submit(fill, lambda: pipeline, tmp_path / "set", 6, settings(seed=2))
        with suppress(TimeoutError):
            second.result(1)
        enough.set()
        assert (first.result(30), second.result(30)) == (3, 3)
    files = contents(tmp_path / "set")
    assert json.loads(files.pop(MANIFEST)) == {**settings(), "slots": list(range(6))}
    assert files == {f"{index:05d}.png": complete[f"{index:05d}.png"] for index in range(6)}
    assert "is being filled by another process: waiting for it" in caplog.text


def run_rank(pipeline: Any, folder: Path, meeting: Path, rank: int, world: int) -> None:
    torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=world)
    fill(lambda: pipeline, folder, NUMBER, settings(), rank, world, torch.distributed.barrier)
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings(FORK_WARNING)
def test_two_ranks_draw_what_one_draws(
    complete: dict[str, bytes], pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    ranks = [start(run_rank, pipeline, tmp_path / "set", tmp_path / "meeting", rank, 2) for rank in range(2)]
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    assert contents(tmp_path / "set") == complete


@pytest.mark.filterwarnings(FORK_WARNING)
def test_three_kills_leave_no_trace(
    complete: dict[str, bytes], pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    drawn = 0
    for more in (3, 9, 1):
        before, drawn = drawn, kill_after(more, tmp_path, fill, lambda: pipeline, tmp_path, NUMBER, settings())
        assert before < drawn < NUMBER
    assert fill(lambda: pipeline, tmp_path, NUMBER, settings()) == NUMBER - drawn
    assert contents(tmp_path) == complete


def test_own_pictures_count_and_stay(
    complete: dict[str, bytes], pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    own = {"00001.png": complete["00000.png"], "my dog.jpg": complete["00001.png"]}
    restore(tmp_path, own)
    assert fill(lambda: pipeline, tmp_path, 6, settings()) == 4
    drawn = {name: complete[name] for name in ("00000.png", "00002.png", "00003.png", "00004.png")}
    files = contents(tmp_path)
    assert json.loads(files.pop(MANIFEST))["slots"] == [0, 2, 3, 4]
    assert files == own | drawn
    (tmp_path / "another.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"another\.png \(not a picture"):
        fill(never, tmp_path, 6, settings())


def test_plan_fills_the_first_free_slots() -> None:
    own = [Path("x/00001.png"), Path("x/a.jpg")]
    assert plan(own, [0, 7], 7) == [2, 3, 4]
    assert plan(own, [0, 7], 3) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base": "c"}, "model.from_pretrained or model.restore_from_path is 'c', the set has 'b'"),
        ({"prompt": "a cat"}, "model.data.regularization_prompt is 'a cat', the set has 'a dog'"),
        ({"sampler_type": "DPM"}, "model.data.sampler.sampler_type is 'DPM', the set has 'DDIM'"),
        ({"inference_steps": 3}, "inference_steps is 3, the set has 2"),
        ({"unconditional_guidance_scale": 4}, "unconditional_guidance_scale is 4, the set has 3.0"),
        ({"guidance_rescale": 0.7}, "model.data.sampler.guidance_rescale is 0.7, the set has 0.0"),
        ({"resolution": 64}, "model.data.resolution is 64, the set has 32"),
    ],
)
def test_another_base_prompt_or_sampler_is_refused(
    complete: dict[str, bytes], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    restore(tmp_path, complete)
    with pytest.raises(UserError) as error:
        fill(never, tmp_path, NUMBER + 5, settings(**change))
    assert words in str(error.value)
    assert "model.data.regularization_dir=" in str(error.value)
    assert contents(tmp_path) == complete


def test_a_manifest_without_pictures_binds_nobody_and_a_damaged_one_is_named(
    complete: dict[str, bytes], pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    restore(tmp_path, {MANIFEST: complete[MANIFEST]})
    inspect(tmp_path, settings(prompt="a cat"))
    fill(lambda: pipeline, tmp_path, 1, settings(seed=5))
    assert json.loads((tmp_path / MANIFEST).read_text()) == {**settings(seed=5), "slots": [0]}
    whole = settings(slots=[0])
    wrong = [
        {"slots": ["a"]},
        {"slots": [-1]},
        {"slots": [True]},
        {"num_images_per_prompt": 0},
        {"num_images_per_prompt": "4"},
    ]
    for text in ("{", "[]", "{}", json.dumps(settings()), *(json.dumps(whole | part) for part in wrong)):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(UserError, match=f"{tmp_path}/{MANIFEST} is no manifest; delete it"):
            inspect(tmp_path, settings())


def test_a_set_of_before_guidance_was_rescaled_goes_on(
    complete: dict[str, bytes], pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    """Its manifest says nothing about it, which means 0."""
    restore(tmp_path, {name: complete[name] for name in ("00000.png", "00001.png", "00002.png", "00003.png")})
    manifest = {key: value for key, value in settings(slots=[0, 1, 2, 3]).items() if key != "guidance_rescale"}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"guidance_rescale is 0\.7, the set has 0\.0"):
        inspect(tmp_path, settings(guidance_rescale=0.7))
    assert fill(lambda: pipeline, tmp_path, 2 * CHUNK, settings()) == CHUNK
    assert json.loads((tmp_path / MANIFEST).read_text()) == settings(slots=list(range(2 * CHUNK)))
    assert all((tmp_path / f"{index:05d}.png").read_bytes() == complete[f"{index:05d}.png"] for index in range(8))


def pictures(pipeline: Any, seeds: list[int], sampler: str = "DDIM", **more: Any) -> list[bytes]:
    given = {"steps": 3, "guidance": 3.0, "negative_prompt": None, "resolution": 32, **more}
    return [image.tobytes() for image in draw(pipeline, ["a dog"] * len(seeds), seeds, sampler_type=sampler, **given)]


def test_a_picture_depends_on_its_seed_and_not_on_its_companions(pipeline: StableDiffusionPipeline) -> None:
    torch.manual_seed(0)
    first = pictures(pipeline, [1, 2, 3])
    torch.manual_seed(1)
    assert pictures(pipeline, [1, 3, 4])[:2] == [first[0], first[2]]
    assert pictures(pipeline, [1, 2, 3], negative_prompt="a cat") != first


def test_rescaled_guidance_is_that_of_diffusers(pipeline: StableDiffusionPipeline) -> None:
    seeds = [1, 2]
    plain, rescaled = pictures(pipeline, seeds), pictures(pipeline, seeds, guidance_rescale=0.7)
    assert plain != rescaled
    assert plain == pictures(pipeline, seeds, guidance_rescale=0.0)
    pipeline.scheduler, own = scheduler_for(pipeline.scheduler, "DDIM"), pipeline.scheduler
    how = {"num_inference_steps": 3, "guidance_scale": 3.0, "guidance_rescale": 0.7, "height": 32, "width": 32}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    drawn = pipeline(["a dog"] * 2, **how, generator=generators, output_type="pil").images
    pipeline.scheduler = own
    assert [image.tobytes() for image in drawn] == rescaled


@pytest.mark.parametrize("folder", ["tiny_sd", "tiny_sd_v"])
def test_every_sampler_takes_the_checkpoints_schedule_and_leaves_no_trace(
    folder: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(request.getfixturevalue(folder), safety_checker=None)
    own, config = pipeline.scheduler, dict(pipeline.scheduler.config)
    pipeline.unet.train()
    pipeline.unet.mid_block.eval()
    drawn = {name: pictures(pipeline, [1], name)[0] for name in SAMPLERS}
    assert len(set(drawn.values())) == len(SAMPLERS)
    assert pipeline.unet.training
    assert not any(part.training for part in (pipeline.unet.mid_block, pipeline.vae, pipeline.text_encoder))
    assert pipeline.scheduler is own
    assert dict(own.config) == config
    for name in SAMPLERS:
        scheduler = scheduler_for(own, name)
        assert scheduler.config.prediction_type == config["prediction_type"]
        assert torch.equal(scheduler.alphas_cumprod, own.alphas_cumprod)
    assert scheduler_for(own, "DDIM").config.clip_sample is False
    assert scheduler_for(own, "PLMS").config.skip_prk_steps is True
    assert (
        scheduler_for(DDIMScheduler(), "DDIM").config.clip_sample is False
    )  # it says nothing, and diffusers would clip
    assert not caplog.records


def test_pictures_that_are_not_finite_are_an_error(tiny_sd: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    torch.nn.init.constant_(pipeline.unet.conv_out.weight, float("inf"))
    with pytest.raises(UserError, match="not finite"):
        pictures(pipeline, [1])
