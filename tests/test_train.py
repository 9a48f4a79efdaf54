"""The tasks train and prepare, as a user runs them."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dreambooth import UserError, compose, train
from dreambooth.callbacks.checkpoint import checkpoints
from dreambooth.parallel.tensors import read
from dreambooth.tasks import prepare

ROOT = Path(__file__).parent.parent
# a shell starts what it runs in the background with SIGINT ignored, and a child inherits that
PROGRAM = (
    "import signal, torch; signal.signal(signal.SIGINT, signal.default_int_handler); torch.set_num_threads(1); "
    "from dreambooth.cli import main; main()"
)
COUNTS = ("num_instance", "num_regularization", "regularization_generated", "latents_encoded")


@pytest.fixture
def settings(tiny_sd: Path, photos: Path, tmp_path: Path) -> list[str]:
    """A short run of the tiny model on five photos and four regularization pictures."""
    return [
        f"model.from_pretrained={tiny_sd}",
        f"model.data.instance_dir={photos}",
        f"model.data.cached_instance_dir={tmp_path / 'cache'}",
        f"model.data.regularization_dir={tmp_path / 'class'}",
        "model.data.resolution=32",
        "model.data.num_reg_images=4",
        "model.data.sampler.inference_steps=1",
        "model.micro_batch_size=1",
        "callbacks.sample_grid=null",
        "callbacks.evaluate=null",
        "trainer.accelerator=cpu",
    ]


def begin(folder: Path, settings: list[str]) -> subprocess.Popen[str]:
    """The command in a process of its own, begun in ``folder``."""
    command = [sys.executable, "-c", PROGRAM, *settings, f"hydra.run.dir={folder}"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder.parent, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def wait_for_row(process: subprocess.Popen[str], metrics: Path, step: int) -> None:
    """Return once metrics.csv has a row of ``step`` or later."""
    deadline = time.monotonic() + 60
    while not (metrics.exists() and any(int(row[0]) >= step for row in rows_of(metrics))):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def rows_of(metrics: Path) -> list[list[str]]:
    return [row for row in list(csv.reader(metrics.read_text().splitlines()))[1:] if row]


@pytest.mark.slow
def test_photos_as_a_telephone_takes_them_are_learned_and_prepared_once(tmp_path: Path) -> None:
    """Large JPEGs that lie on their side and say so; the second run finds all that the first one has made."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, turned in enumerate((6, 8)):
        (exif := Image.Exif())[0x0112] = turned  # the tag of the orientation
        noise = torch.rand(3, 4, 3, generator=torch.Generator().manual_seed(number)).mul(255).byte().numpy()
        Image.fromarray(noise).resize((1000, 750)).save(photos / f"{number}.jpg", exif=exif)
    settings = f"""model=pocket model.data.instance_dir={photos} model.data.cached_instance_dir={tmp_path / "cache"}
        model.data.regularization_dir={tmp_path / "class"} model.data.num_reg_images=4 trainer.max_steps=2
        model.data.sampler.inference_steps=2 callbacks.sample_grid.num_images_per_prompt=1 callbacks/evaluate=none
        trainer.accelerator=cpu hydra.run.dir={tmp_path / "run"}""".split()
    first, second = train(compose(settings)), train(compose([*settings, "resume=false"]))
    counts = [[run.summary[name] for name in COUNTS] for run in (first, second)]
    assert counts == [[2, 4, 4, 6], [2, 4, 0, 0]]
    assert [run.folder.name for run in (first, second)] == ["run", "run-2"]
    for run in (first, second):
        assert {path.name for path in run.folder.glob("samples/*")} == {"step_000000.png", "step_000002.png"}


@pytest.mark.slow
def test_prepare_then_epochs(settings: list[str], tmp_path: Path) -> None:
    """prepare leaves nothing to make; 2 epochs of 5 photos x 3 repeats are 3 full batches of 4 each."""
    run = f"hydra.run.dir={tmp_path / 'run'}"
    drawn = prepare(compose(["task=prepare", *settings, run]))
    assert sorted(path.name for path in drawn.glob("*.png")) == [f"{index:05d}.png" for index in range(4)]
    assert not (tmp_path / "run").exists()
    epochs = ["trainer.max_steps=-1", "trainer.max_epochs=2", "model.data.train_data_repeats=3"]
    batches = ["trainer.accumulate_grad_batches=2", "model.micro_batch_size=2"]
    cfg = compose([*settings, run, *epochs, *batches])
    result = train(cfg)
    assert result.folder == tmp_path / "run"
    assert {
        "steps": 6,
        "regularization_generated": 0,
        "latents_encoded": 0,
        "num_instance": 5,
    }.items() <= result.summary.items()
    assert [path.name for path in checkpoints(result.folder / "checkpoints")] == ["step_000006.ckpt"]
    assert train(cfg) == result
    (result.folder / "summary.json").unlink()  # killed after the last step, before the export
    shutil.rmtree(result.folder / "pipeline")
    assert train(cfg).summary["resumed_from"] == 6
    assert (result.folder / "pipeline/model_index.json").exists()
    more = train(compose([*settings, run, *epochs, *batches, "trainer.max_epochs=3"]))
    assert (more.folder, more.summary["steps"], more.summary["resumed_from"]) == (result.folder, 9, 6)
    assert [int(row[0]) for row in rows_of(more.folder / "metrics.csv")] == list(range(1, 10))
    with pytest.raises(UserError, match=r"trainer\.max_steps=-1 to count epochs"):
        train(compose([*settings, run, "trainer.max_epochs=2"]))


def test_a_model_of_another_kind_is_refused_before_anything_is_written(
    settings: list[str], tiny_sd: Path, tmp_path: Path
) -> None:
    flow = shutil.copytree(tiny_sd, tmp_path / "flow")
    scheduler = flow / "scheduler/scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("epsilon", "flow_prediction"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"'flow_prediction'.*epsilon, v_prediction, sample"):
        train(compose([*settings, f"model.from_pretrained={flow}", f"hydra.run.dir={tmp_path / 'run'}"]))
    assert sorted(tmp_path.rglob("*")) == before


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file with its time and bytes."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_what_a_finished_run_refuses_leaves_it_as_it_is(settings: list[str], tiny_sd: Path, tmp_path: Path) -> None:
    """Another base under the same name, or another global batch, with a raised goal; then the old command."""
    base = shutil.copytree(tiny_sd, tmp_path / "base")
    run = [*settings, f"model.from_pretrained={base}", f"hydra.run.dir={tmp_path / 'run'}"]
    run += ["model.with_prior_preservation=false", "logger=none"]
    done = train(compose([*run, "trainer.max_steps=1"]))
    before = contents(done.folder)
    with pytest.raises(UserError, match="these would see 2"):
        train(compose([*run, "trainer.max_steps=2", "model.micro_batch_size=2"]))
    assert contents(done.folder) == before
    weights = base / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    first = next(iter(tensors))
    save_file(tensors | {first: tensors[first] + 1}, weights, {"format": "pt"})
    with pytest.raises(UserError, match="was trained from another model"):
        train(compose([*run, "trainer.max_steps=2"]))
    assert contents(done.folder) == before
    for photo in (tmp_path / "photos").iterdir():
        photo.write_bytes(b"")
    assert train(compose([*run, "trainer.max_steps=1"])) == done  # whatever became of its photos
    with pytest.raises(UserError, match=r"^model\.data\.instance_dir: 5 of 5 pictures cannot be read"):
        train(compose([*run, "trainer.max_steps=2", "model.from_pretrained=nobody/nothing", "resume=false"]))


def test_a_model_that_is_to_draw_and_is_not_there_leaves_no_run_folder(settings: list[str], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    run = [*settings, f"hydra.run.dir={tmp_path / 'run'}"]
    for place, words in ((tmp_path / "nope", "No model at"), (tmp_path / "photos", "model_index.json cannot be read")):
        with pytest.raises(UserError, match=rf"^model\.restore_from_path={place}: .*{words}"):
            train(compose([*run, f"model.restore_from_path={place}"]))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.exhaustive
def test_killed_at_any_moment_it_goes_on(settings: list[str], tmp_path: Path) -> None:
    """kill -9 twice, Ctrl-C, SIGTERM: the weights are those of a run that nobody disturbed."""
    settings += ["trainer.max_steps=110", "callbacks.checkpoint.every_n_train_steps=7", "model.train_text_encoder=true"]
    settings += ["model.ema.decay=0.9", "trainer.accumulate_grad_batches=2", "model.optim.lr=1e-3"]
    prepare(compose(["task=prepare", *settings]))
    folder, lost = tmp_path / "run", []
    stops = [(3, signal.SIGKILL), (16, signal.SIGKILL), (30, signal.SIGINT), (50, signal.SIGTERM)]  # far from the end
    for step, sign in stops:
        process = begin(folder, settings)
        wait_for_row(process, folder / "metrics.csv", step)
        process.send_signal(sign)
        output = "".join(process.communicate(timeout=60))
        assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[sign]
        reached, kept = int(rows_of(folder / "metrics.csv")[-1][0]), checkpoints(folder / "checkpoints")
        lost.append(reached - (int(kept[-1].stem[5:]) if kept else 0))
        if sign != signal.SIGKILL:
            assert f"the same command goes on from step {int(kept[-1].stem[5:])}" in output
            assert "Traceback" not in output
    assert all(0 <= steps <= 7 for steps in lost)
    process = begin(folder, settings)
    output = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert [int(row[0]) for row in rows_of(folder / "metrics.csv")] == list(range(1, 111))
    whole = train(compose([*settings, f"hydra.run.dir={tmp_path / 'whole'}"]))
    assert whole.summary["resumed_from"] is None
    losses = [float(row["loss"]) for row in csv.DictReader((whole.folder / "metrics.csv").read_text().splitlines())]
    assert whole.summary["final"]["loss"] == pytest.approx(sum(losses[-20:]) / 20)
    last = "checkpoints/step_000110.ckpt"
    a, b = (read(run / last, "") for run in (folder, whole.folder))
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert {name.split("/")[0] for name in a} == {"weights", "averages", "optimizer"}
    for path in (whole.folder / "pipeline").rglob("*.safetensors"):
        assert (folder / path.relative_to(whole.folder)).read_bytes() == path.read_bytes()
