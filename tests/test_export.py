"""What is left of a run: metrics, samples, pipeline/ and summary.json of real, tiny trainings."""

import csv
import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dreambooth.callbacks.metrics_csv import COLUMNS, read_rows
from dreambooth.config import compose
from dreambooth.errors import UserError
from dreambooth.families.sd import StableDiffusion
from dreambooth.parallel.tensors import read
from dreambooth.sampling import draw, picture_seed
from dreambooth.tasks import RunResult, train
from tests.tiny import RESOLUTION, short_run

SAMPLER = ["inference_steps=2", "unconditional_guidance_scale=3.0", "sampler_type=DDIM"]


def tiny_run(model: Path, photos: Path, folder: Path, *more: str) -> RunResult:
    """Train ``model`` on ``photos`` without the prior, with two samples of two prompts every second step."""
    overrides = [
        *short_run(model, photos, folder),
        "callbacks.sample_grid.prompts=[a dog,a photo of a sks dog on the beach]",
        "callbacks.sample_grid.every_n_train_steps=2",
        "callbacks.sample_grid.num_images_per_prompt=2",
        "callbacks.evaluate=null",
        *(f"callbacks.sample_grid.{setting}" for setting in SAMPLER),
    ]
    return train(compose([*overrides, *more]))


@pytest.fixture(scope="module")
def finished(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """Five steps of two micro-batches, with averaged weights."""
    photos = tmp_path_factory.mktemp("photos")
    for number in range(3):
        Image.effect_noise((40, 40), 30 * number + 10).convert("RGB").save(photos / f"{number}.png")
    more = ["trainer.max_steps=5", "trainer.accumulate_grad_batches=2", "model.ema.decay=0.9"]
    return tiny_run(tiny_sd, photos, tmp_path_factory.mktemp("run") / "one", *more)


@pytest.mark.slow
def test_tensorboard_is_told_every_nth_row_and_the_grids(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    more = ("trainer.max_steps=4", "trainer.log_every_n_steps=2")
    run = tiny_run(tiny_sd, photos, tmp_path / "run", *more)
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert losses == {k: pytest.approx(float(rows_of(run.folder)[k - 1]["loss"])) for k in (2, 4)}
    assert [event.step for event in events.Images("samples")] == [0, 2, 4]
    silent = tiny_run(tiny_sd, photos, tmp_path / "silent", *more, "logger=none")
    assert not (silent.folder / "tensorboard").exists()


def rows_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))


@pytest.mark.slow
def test_a_run_leaves_what_the_contract_says(finished: RunResult, tiny_sd: Path) -> None:
    folder, summary = finished.folder, finished.summary
    assert {path.name for path in folder.iterdir()} == {
        *("config.yaml", "metrics.csv", "samples", "checkpoints", "pipeline", "summary.json", "tensorboard"),
        *("overrides.yaml", "report.html"),
    }
    assert sorted(path.stem for path in (folder / "samples").iterdir()) == [f"step_00000{k}" for k in (0, 2, 4, 5)]
    rows = rows_of(folder)
    assert list(rows[0]) == list(COLUMNS)
    assert [row["step"] for row in rows] == list("12345")
    assert {float(row["lr"]) for row in rows} == {1e-3}
    for row in rows:  # four examples a step, one in each quarter of the noise levels
        quarters = [float(row[f"loss_q{number}"]) for number in (1, 2, 3, 4)]
        assert sum(quarters) / 4 == pytest.approx(float(row["loss"]), rel=1e-4)
    assert summary == json.loads((folder / "summary.json").read_text())
    assert list(summary) == [
        *("seconds", "steps", "resumed_from", "steps_per_second", "samples_per_second", "peak_memory_mb"),
        "num_instance",
        *("num_regularization", "regularization_generated", "latents_encoded", "final", "versions", "seed"),
    ]
    seconds = summary["seconds"]
    assert list(seconds) == ["prepare_regularization", "cache_latents", "train", "sample", "total"]
    assert 0 < seconds["train"] < seconds["total"]
    assert 0 < seconds["sample"] < seconds["total"]
    assert (summary["steps"], summary["resumed_from"], summary["num_instance"], summary["seed"]) == (5, None, 3, 1234)
    assert summary["final"]["loss"] == pytest.approx(np.mean([float(row["loss"]) for row in rows]))
    assert summary["peak_memory_mb"] > 100
    assert {"dreambooth", "python", "torch", "diffusers"} <= set(summary["versions"])


@pytest.mark.parametrize("step", [0, 5])
def test_a_grid_is_of_the_untouched_model_then_of_the_averaged_weights(
    finished: RunResult, tiny_sd: Path, step
) -> None:
    with Image.open(finished.folder / "samples" / f"step_{step:06d}.png") as sheet:
        grid = np.asarray(sheet.convert("RGB"))
    pipeline = StableDiffusion(str(finished.folder / "pipeline" if step else tiny_sd)).to_pipeline()
    seeds = [picture_seed(1234, 1, picture) for picture in range(2)]
    how = {"steps": 2, "guidance": 3.0, "sampler_type": "DDIM", "negative_prompt": None, "resolution": RESOLUTION}
    drawn = draw(pipeline, ["a photo of a sks dog on the beach"] * 2, seeds, **how)
    side = RESOLUTION * 5
    second = grid[-side - 6 : -6, -side - 6 : -6]
    assert np.array_equal(second, np.asarray(drawn[1].resize((side, side), Image.Resampling.NEAREST)))


@pytest.mark.exhaustive
def test_the_pipeline_draws_elsewhere_what_the_averaged_weights_draw_here(finished: RunResult, tmp_path: Path) -> None:
    folder = finished.folder
    checkpoint = next((folder / "checkpoints").glob("*.ckpt"))
    family = StableDiffusion(str(folder / "pipeline"))
    weights = {f"unet.{name}": weight for name, weight in family.unet.named_parameters()}
    averaged, last = read(checkpoint, "averages/"), read(checkpoint, "weights/")
    assert weights.keys() == averaged.keys() == last.keys()
    assert all(torch.equal(weight, averaged[name]) for name, weight in weights.items())
    assert not all(torch.equal(weight, last[name]) for name, weight in weights.items())

    code = f"""
import sys, torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained({str(folder / "pipeline")!r}, local_files_only=True)
pipeline("a dog", num_inference_steps=3, generator=torch.Generator().manual_seed(3)).images[0].save("elsewhere.png")
assert not any(name.startswith("dreambooth") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True, capture_output=True)
    here = family.to_pipeline()("a dog", num_inference_steps=3, generator=torch.Generator().manual_seed(3)).images[0]
    with Image.open(tmp_path / "elsewhere.png") as elsewhere:
        assert np.array_equal(np.asarray(elsewhere), np.asarray(here))


@pytest.mark.slow
def test_a_finished_run_is_left_and_a_killed_one_gets_its_end(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = tiny_run(tiny_sd, photos, folder, "trainer.max_steps=2")
    stamp = (folder / "pipeline" / "model_index.json").stat().st_mtime_ns
    assert tiny_run(tiny_sd, photos, folder, "trainer.max_steps=2") == first
    assert (folder / "pipeline" / "model_index.json").stat().st_mtime_ns == stamp

    # Killed after its last step: nothing to train, but the grid, the export and the summary are missing.
    (folder / "summary.json").unlink()
    (folder / "samples" / "step_000002.png").unlink()
    (folder / f".pipeline.{socket.gethostname()}-{2**22 + 1}.tmp" / "unet").mkdir(parents=True)
    (folder / "pipeline" / "model_index.json").unlink()
    again = tiny_run(tiny_sd, photos, folder, "trainer.max_steps=2")
    assert (again.summary["steps"], again.summary["resumed_from"]) == (2, 2)
    assert again.summary["steps_per_second"] is None
    assert again.summary["final"] == first.summary["final"]
    assert (folder / "samples" / "step_000002.png").exists()
    assert not list(folder.glob(".*"))
    assert (folder / "pipeline" / "model_index.json").exists()

    # Raised, with what a killed process leaves in metrics.csv: rows after the checkpoint, the last one cut short.
    text = (folder / "metrics.csv").read_text()
    (folder / "metrics.csv").write_text(text + text.splitlines()[-1].replace("2,", "3,", 1) + "\n4,0.12")
    before = text.splitlines()
    raised = tiny_run(tiny_sd, photos, folder, "trainer.max_steps=4")
    assert (raised.summary["steps"], raised.summary["resumed_from"]) == (4, 2)
    after = (folder / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in after] == ["step", *"1234"]
    assert after[: len(before)] == before


@pytest.mark.exhaustive
def test_training_is_the_same_with_and_without_looking(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    looking = tiny_run(tiny_sd, photos, tmp_path / "a", "trainer.max_steps=3")
    blind = tiny_run(tiny_sd, photos, tmp_path / "b", "trainer.max_steps=3", "callbacks.sample_grid=null")
    assert looking.summary["final"] == blind.summary["final"]
    assert blind.summary["seconds"]["sample"] == 0
    weights = [StableDiffusion(str(run.folder / "pipeline")).fingerprint() for run in (looking, blind)]
    assert weights[0] == weights[1]


def test_foreign_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    assert read_rows(path, 3) == []
    path.write_text("epoch,loss\n1,2\n")
    with pytest.raises(UserError, match=r"other columns.*resume=false"):
        read_rows(path, 3)
