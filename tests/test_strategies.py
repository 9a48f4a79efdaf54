"""Every strategy, with real processes over gloo: trains, is killed, goes on, and hands over to others.

Which option is tried under which strategy is the table ``CASES``; ``EXHAUSTIVE`` completes it.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dreambooth import UserError, compose, train
from dreambooth.callbacks.checkpoint import checkpoints
from dreambooth.parallel.export import export
from dreambooth.parallel.tensors import read
from dreambooth.run_folder import open_run
from tests import strategies
from tests.strategies import Job, finish, kill_after, rows
from tests.test_evaluate import MEASURED
from tests.tiny import short_run

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent

LAST = 6  # steps, saved every other; a pair begins at 2, is killed after 4, and hands over to one process at the end
CASES: dict[str, dict[str, Any]] = {
    "ddp": {"module": {"text": True}},
    "fsdp": {"tuning": "lora", "accumulate": 2, "size": 4},
    "deepspeed_1": {"clip": None, "prior": False},
    "deepspeed_2": {"tuning": "lora", "accumulate": 2, "size": 4},
    "deepspeed_2_offload": {"accumulate": 2, "size": 4},
    "deepspeed_3": {"ema": None, "module": {"gradient_checkpointing": True}},
    "deepspeed_3_offload": {"ema": None},
}
FINITE = ["fsdp", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("deepspeed_2", "deepspeed_3"))]
UNCACHED = {"ema": None, "photos": Path("photos")}  # as with use_cached_latents=false
EXHAUSTIVE: list[tuple[str, dict[str, Any]]] = [
    ("fsdp", {"module": {"text": True, "gradient_checkpointing": True}}),
    ("fsdp", {"ema": None, "clip": None, "prior": False}),
    ("deepspeed_2", {"module": {"text": True, "gradient_checkpointing": True}}),
    ("deepspeed_3", {"ema": None, "tuning": "lora", "accumulate": 2, "size": 4, "module": {"text": True}}),
    ("deepspeed_3", {"ema": None, "clip": None, "prior": False}),
    *((strategy, UNCACHED) for strategy in ("fsdp", "deepspeed_2", "deepspeed_3")),
    *((strategy, {"ema": None, "precision": "bf16-mixed"}) for strategy in ("fsdp", "deepspeed_2", "deepspeed_3")),
    *((strategy, {"tuning": "lora"}) for strategy in ("ddp", "deepspeed_1", "deepspeed_2_offload")),
    ("deepspeed_3_offload", {"tuning": "lora", "ema": None}),
    ("fsdp", {"tuning": "dora"}),
    ("deepspeed_3", {"tuning": "dora", "ema": None}),
    *((strategy, {"tuning": "textual_inversion"}) for strategy in ("ddp", "fsdp", "deepspeed_2")),
    *((strategy, {"tuning": "pivotal"}) for strategy in ("ddp", "fsdp", "deepspeed_2")),
    ("ddp", {"tuning": "pivotal_in_turn"}),
    *(("deepspeed_3", {"tuning": tuning, "ema": None}) for tuning in ("textual_inversion", "pivotal")),
    *((strategy, {"tuning": "lora", "module": {"teacher": True}}) for strategy in ("ddp", "fsdp", "deepspeed_2")),
    ("deepspeed_3", {"tuning": "lora", "ema": None, "module": {"teacher": True}}),
]


def spelled(case: tuple[str, dict[str, Any]]) -> str:
    """A case as its test is called."""
    strategy, options = case
    flat = {key: value for key, value in options.items() if key != "module"} | options.get("module", {})
    return " ".join([strategy, *(f"{key}={value}" for key, value in flat.items())])


def alike(found: dict[str, float], expected: dict[str, float], precision: str = "32-true") -> None:
    """Metrics of one step, within the tolerance of another order of summation; bf16 has 8 bits."""
    rel = 2e-4 if precision == "32-true" else 3e-2
    assert found == pytest.approx(expected, rel=rel, abs=1e-6, nan_ok=True)


def go_around(model: Path, folder: Path, strategy: str, options: dict[str, Any], ranks: int = 2) -> None:
    """One process, a pair that is killed, the pair again, one process: the losses and pipeline of an unbroken run."""
    whole = Job(model, folder / "whole", steps=LAST, **options)
    whole.folder.mkdir(parents=True)
    whole()
    expected, parts = rows(whole.folder), folder / "parts"
    pair = replace(whole, folder=parts, strategy=strategy, ranks=ranks, size=whole.size // ranks)
    parts.joinpath("checkpoints").mkdir(parents=True)
    (parts / "checkpoints/step_000002.ckpt").write_bytes((whole.folder / "checkpoints/step_000002.ckpt").read_bytes())
    kill_after(replace(pair, pause=0.3), "checkpoints/step_000004.ckpt")
    finish(pair)
    found = rows(parts)
    assert list(found) == list(range(3, LAST + 1))
    for step, row in found.items():
        alike(row, expected[step], whole.precision)
    # AdamW goes a whole step of 1e-3 by the sign of a gradient, which in bf16 is chance where it is small.
    atol = 3e-4 if whole.precision == "32-true" else 4e-3
    same_exports(whole.folder, parts, atol)
    end = f"checkpoints/step_{LAST:06d}.ckpt"
    ours, theirs = read(parts / end, ""), read(whole.folder / end, "")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if whole.precision == "32-true" or name.startswith("weights/"):
            torch.testing.assert_close(ours[name], value, atol=atol, rtol=1e-2, msg=f"{name} differs")
    one, two = (replace(whole, folder=place, steps=LAST + 1) for place in (parts, whole.folder))
    one(), two()
    alike(rows(parts)[LAST + 1], rows(whole.folder)[LAST + 1], whole.precision)
    assert [int(path.stem[5:]) for path in checkpoints(parts / "checkpoints")] == [2, 4, 6, 7]


def same_exports(expected: Path, found: Path, atol: float = 3e-4) -> None:
    """What was exported, adapters included, is the same within the tolerance of the weights."""
    files = sorted(
        path.relative_to(expected)
        for name in ("pipeline", "adapter")
        for path in (expected / name).rglob("*.safetensors")
    )
    assert any(path.parts[0] == "pipeline" for path in files)
    assert (found / "adapter").is_dir() == (expected / "adapter").is_dir()
    for path in files:
        ours, theirs = load_file(found / path), load_file(expected / path)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, atol=atol, rtol=0)


@pytest.mark.parametrize("strategy", CASES)
def test_goes_around(tiny_sd: Path, tmp_path: Path, strategy: str) -> None:
    go_around(tiny_sd, tmp_path, strategy, CASES[strategy])


@pytest.mark.exhaustive
@pytest.mark.parametrize(("strategy", "options"), EXHAUSTIVE, ids=map(spelled, EXHAUSTIVE))
def test_goes_around_with_other_options(
    tiny_sd: Path, photos: Path, tmp_path: Path, strategy: str, options: dict[str, Any]
) -> None:
    given = {"photos": photos} if "photos" in options else {}
    go_around(tiny_sd, tmp_path, strategy, options | given)


@pytest.mark.exhaustive
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_hybrid_shards(tiny_sd: Path, tmp_path: Path, tuning: str) -> None:
    """Four ranks, two groups of two that each hold all weights together."""
    go_around(tiny_sd, tmp_path, "fsdp_hybrid", {"size": 4, "tuning": tuning}, ranks=4)


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_2", "deepspeed_3"])
@pytest.mark.exhaustive
def test_what_a_killed_pair_left_is_exported(strategy: str, tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    """By task=export, which is one process: the weights of the pair's checkpoint."""
    run = tmp_path / "run"
    open_run(compose([*short_run(tiny_sd, photos, run), "model.ema.decay=null"]), run)
    pair = Job(tiny_sd, run, strategy, 2, steps=LAST, size=1, ema=None, pause=0.3)
    kill_after(pair, "checkpoints/step_000004.ckpt")
    export(compose(["task=export", f"infer.model={run}"]))
    expected = read(run / "checkpoints/step_000004.ckpt", "weights/")
    found = load_file(run / "pipeline/unet/diffusion_pytorch_model.safetensors")
    assert len(expected) == len(found)
    for name, value in expected.items():
        assert torch.equal(found[name.removeprefix("unet.")], value), name


@pytest.mark.exhaustive
def test_usr1_to_one_of_two_that_share_the_weights(tiny_sd: Path, tmp_path: Path) -> None:
    """Both save together at the end of the next step; what goes on from there is the unbroken run."""
    whole = Job(tiny_sd, tmp_path / "whole", steps=LAST)
    whole.folder.mkdir()
    whole()
    pair = replace(whole, folder=tmp_path / "parts", strategy="fsdp", ranks=2, size=1, told=2)
    processes = strategies.start(pair)
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [143, 143]
    assert [path.stem for path in checkpoints(pair.folder / "checkpoints")] == ["step_000002", "step_000003"]
    finish(replace(pair, told=None))
    assert list(rows(pair.folder)) == list(range(1, LAST + 1))
    for step, row in rows(pair.folder).items():
        alike(row, rows(whole.folder)[step])
    same_exports(whole.folder, pair.folder)


def test_strategies_hand_over_to_each_other(tiny_sd: Path, tmp_path: Path) -> None:
    """ddp, fsdp, ZeRO-3 and one process, a step each: the losses of one process."""
    whole = Job(tiny_sd, tmp_path / "whole", steps=4, ema=None)
    whole.folder.mkdir()
    whole()
    parts = replace(whole, folder=tmp_path / "parts", size=1, ranks=2)
    for step, strategy in enumerate(("ddp", "fsdp", "deepspeed_3"), 1):
        finish(replace(parts, strategy=strategy, steps=step))
    replace(whole, folder=parts.folder)()
    for step, row in rows(parts.folder).items():
        alike(row, rows(whole.folder)[step])
    same_exports(whole.folder, parts.folder)


@pytest.mark.parametrize("strategy", FINITE)
def test_a_gradient_that_is_not_finite_changes_nothing(tiny_sd: Path, tmp_path: Path, strategy: str) -> None:
    job = Job(tiny_sd, tmp_path, strategy, 2, steps=2, size=3, prior=False, poison="instance/3", ema=None)
    finish(job)
    untouched = dict(strategies.make_module(job).learned.named_parameters())
    for name, value in read(tmp_path / "checkpoints/step_000002.ckpt", "weights/").items():
        assert torch.equal(value, untouched[name]), name


@pytest.mark.parametrize("reason", ["no room", "no folder"])
def test_where_one_rank_cannot_save_all_say_so_and_stop(
    tiny_sd: Path, small_disk: Path, tmp_path: Path, reason: str
) -> None:
    pair = Job(tiny_sd, tmp_path / "run", "fsdp", 2, steps=2, size=1, ema=None)
    pair.folder.mkdir()
    if reason == "no room":
        (pair.folder / "checkpoints").symlink_to(small_disk)
    else:
        (pair.folder / "checkpoints").touch()  # only the first rank makes the folder
    processes = strategies.start(pair)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [1, 1]
    for rank in range(2):
        assert "UserError: cannot write" in (pair.folder / f"rank{rank}.log").read_text()
    assert list(small_disk.iterdir()) == []


@pytest.mark.exhaustive
def test_the_command_goes_on_with_other_ranks(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    """Two processes cut the weights, draw, measure and export as one does; one goes on in their folder."""
    words = [
        *MEASURED,
        "trainer.max_steps=4",
        "callbacks.checkpoint.every_n_train_steps=2",
        "callbacks.evaluate.every_n_train_steps=2",
        "callbacks.evaluate.num_images_per_prompt=1",
        "callbacks.evaluate.patience=null",
        "callbacks.evaluate.max_drift=null",
        "callbacks.evaluate.max_forgetting=null",
        "callbacks.sample_grid.inference_steps=2",
        "callbacks.sample_grid.prompts=[a dog]",
        "callbacks.sample_grid.num_images_per_prompt=1",
        "logger=none",
    ]
    one = train(compose([*short_run(tiny_sd, photos, tmp_path / "one"), *words]))
    settings = [*short_run(tiny_sd, photos, tmp_path / "two"), *words]
    cut = ["strategy=fsdp", "trainer.devices=2", "model.micro_batch_size=1"]
    done = subprocess.run(
        [sys.executable, ROOT / "launch.py", *settings, *cut], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "a step sees 2 photos: model.micro_batch_size=1 x 2 ranks" in done.stderr + done.stdout
    two = tmp_path / "two"
    same_exports(one.folder, two)
    for name in ("step_000000.png", "step_000004.png"):
        ours, theirs = (np.asarray(Image.open(run / "samples" / name), dtype=int) for run in (one.folder, two))
        assert np.abs(ours - theirs).max() <= 2
    assert (two / "evaluation" / "metrics.json").exists()
    assert json.loads((two / "summary.json").read_text())["samples_per_second"] > 0
    longer = train(compose([*settings, "trainer.max_steps=5"]))
    assert longer.summary["resumed_from"] == 4
    with pytest.raises(UserError, match=r"saw 2 pictures of each role, these would see 3.*model.micro_batch_size"):
        train(compose([*settings, "trainer.max_steps=6", "model.micro_batch_size=3"]))
