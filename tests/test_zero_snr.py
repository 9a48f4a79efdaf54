"""Noise levels that end in pure noise: what is trained, drawn and exported agree, and the base stays as it came."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from dreambooth.config import compose
from dreambooth.errors import UserError
from dreambooth.families.sd import StableDiffusion
from dreambooth.sampling import SAMPLERS, draw, picture_seed, zero_terminal_snr
from dreambooth.tasks import RunResult, train
from tests.tiny import RESOLUTION, build_tiny_sd, short_run

HOW = {"steps": 2, "guidance": 3.0, "sampler_type": "DDIM", "resolution": RESOLUTION}
KEY = "model.objective.rescale_zero_terminal_snr=true"


@pytest.fixture(scope="module")
def finished(tiny_sd_v: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    photos = tmp_path_factory.mktemp("photos")
    Image.effect_noise((40, 40), 30).convert("RGB").save(photos / "0.png")
    sampler = ("inference_steps=2", "unconditional_guidance_scale=3.0", "sampler_type=DDIM", "num_images_per_prompt=1")
    grid = [f"callbacks.sample_grid.{setting}" for setting in (*sampler, "prompts=[a dog]")]
    folder = tmp_path_factory.mktemp("run") / "one"
    words = [*short_run(tiny_sd_v, photos, folder), "trainer.max_steps=2", "logger=none"]
    return train(compose([*words, *grid, "callbacks.evaluate=null", KEY]))


def shown(path: Path) -> np.ndarray:
    """The one picture of a grid, which enlarges by whole pixels."""
    with Image.open(path) as sheet:
        side = RESOLUTION * 5
        return np.asarray(sheet.convert("RGB"))[6 : 6 + side : 5, -side - 6 : -6 : 5]


def test_the_export_says_so_and_draws_with_it(finished: RunResult) -> None:
    config = json.loads((finished.folder / "pipeline/scheduler/scheduler_config.json").read_text())
    assert (config["rescale_betas_zero_snr"], config["timestep_spacing"]) == (True, "trailing")
    assert (config["prediction_type"], config["clip_sample"]) == ("v_prediction", False)
    pipeline = DiffusionPipeline.from_pretrained(finished.folder / "pipeline", local_files_only=True)
    assert pipeline.scheduler.alphas_cumprod[-1] == 0
    seed = picture_seed(1234, 0, 0)
    how = {"num_inference_steps": 2, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(seed)}
    plain = np.asarray(pipeline("a dog", **how).images[0])
    assert pipeline.scheduler.timesteps.tolist() == [999, 499]
    family = StableDiffusion(str(finished.folder / "pipeline"))
    assert np.array_equal(np.asarray(draw(family.to_pipeline(), ["a dog"], [seed], **HOW)[0]), plain)
    assert np.array_equal(shown(finished.folder / "samples" / "step_000002.png"), plain)


def test_the_base_draws_by_its_own_levels(finished: RunResult, tiny_sd_v: Path) -> None:
    family = StableDiffusion(str(tiny_sd_v))
    own = np.asarray(draw(family.to_pipeline(), ["a dog"], [picture_seed(1234, 0, 0)], **HOW)[0])
    assert np.array_equal(shown(finished.folder / "samples" / "step_000000.png"), own)


def test_other_schedulers_become_one_that_can(tmp_path: Path) -> None:
    """PNDM has no such levels: the folder then names DDIM, and every sampler but PLMS draws."""
    family = StableDiffusion(str(build_tiny_sd(tmp_path / "base", "v_prediction", scheduler="PNDM")))
    family.scheduler = zero_terminal_snr(family.scheduler)
    family.save(tmp_path / "out")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
    assert pipeline.scheduler.alphas_cumprod[-1] == 0
    again = StableDiffusion(str(tmp_path / "out"))
    again.save(tmp_path / "again")
    first, second = (tmp_path / name / "scheduler/scheduler_config.json" for name in ("out", "again"))
    assert first.read_bytes() == second.read_bytes()
    for name in set(SAMPLERS) - {"PLMS"}:
        assert draw(again.to_pipeline(), ["a dog"], [1], **{**HOW, "sampler_type": name, "steps": 4})
    with pytest.raises(UserError, match="type DDIM, DPM or EULER"):
        draw(again.to_pipeline(), ["a dog"], [1], **{**HOW, "sampler_type": "PLMS"})


def test_what_cannot_be_is_said_before_anything_is_written(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate\.sampler_type=PLMS"):
        compose([KEY, "evaluate.sampler_type=PLMS"])
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"predicts epsilon .*rescale_zero_terminal_snr=false"):
        train(compose([*short_run(tiny_sd, photos, tmp_path / "run"), KEY]))
    assert set(tmp_path.iterdir()) == before
