"""A real SLURM of two nodes: the script of docs/slurm.md, pre-emption, the launcher, an array."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dreambooth.parallel.tensors import read
from dreambooth.pocket import SUBJECTS
from tests.slurm import Cluster, missing, running_cluster
from tests.test_benchmark import small
from tests.tiny import short_run

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", (ROOT / "docs" / "slurm.md").read_text(), re.DOTALL)
HERE = [
    "--ntasks-per-node=1",
    "--gpus-per-node=0",
    "--cpus-per-task=1",
    "--time=00:20:00",
]  # two nodes of two CPUs each
STEPS = 40
LAYOUT = """Classes

subject_name,class
cat,cat
dog,dog
teapot,teapot

Prompts

Object Prompts

prompt_list = ['a {0} {1} in the jungle'.format(unique_token, class_token)]

Live Subject Prompts

prompt_list = ['a {0} {1} in a chef outfit'.format(unique_token, class_token)]
"""

pytestmark = [pytest.mark.exhaustive, pytest.mark.skipif(bool(missing()), reason=missing())]


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    with running_cluster() as cluster:
        path = f"{Path(sys.executable).parent}:{cluster.env['PATH']}"
        cluster.env |= {"PATH": path, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        yield cluster


@pytest.fixture
def settings(tiny_sd: Path, photos: Path, tmp_path: Path) -> list[str]:
    """A short run of the tiny model that writes no checkpoint by itself but the last."""
    usual = [text for text in short_run(tiny_sd, photos, tmp_path / "run") if not text.startswith("hydra")]
    usual += ["trainer.precision=32-true", "model.micro_batch_size=1", f"trainer.max_steps={STEPS}", "logger=none"]
    return [
        *usual,
        "callbacks.sample_grid=null",
        "callbacks.checkpoint.every_n_train_steps=1000",
        "model.ema.decay=0.9",
    ]


def submit(slurm: Cluster, folder: Path, *command: str) -> str:
    """The number of a job of the script in the docs, with more for sbatch and more settings."""
    (script,) = SCRIPT
    path = folder / "train.sbatch"
    path.write_text(script)
    options = [word for word in command if word.startswith("--")]
    return slurm.call(
        "sbatch", "--parsable", f"--chdir={folder}", *HERE, *options, path, *(w for w in command if w not in options)
    )


def log_of(folder: Path, job: str) -> str:
    path = folder / f"dreambooth-{job}.log"
    return path.read_text() if path.exists() else ""


def logs_of(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("dreambooth-*.log")))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def reached(run: Path, step: int) -> bool:
    metrics = run / "metrics.csv"
    return metrics.exists() and any(row["step"] and int(row["step"]) >= step for row in rows_of(metrics))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read(run / f"checkpoints/step_{STEPS:06d}.ckpt", "")


def test_nothing_of_the_cluster_is_left(tmp_path: Path) -> None:
    """The first test of this file: no other cluster runs yet."""
    hosts = Path("/etc/hosts").read_text()
    with running_cluster() as cluster:
        inside = cluster.folder
        assert cluster.call("sinfo", "--noheader", "--format=%D") == "2"
    assert not inside.exists()
    assert Path("/etc/hosts").read_text() == hosts
    left = subprocess.run(["pgrep", "-af", str(inside)], capture_output=True, text=True, check=False).stdout
    assert [line for line in left.splitlines() if not line.startswith(f"{os.getpid()} ")] == []


def test_a_job_of_two_nodes_that_is_preempted_ends_with_the_weights_of_one_that_is_not(
    slurm, settings, tmp_path
) -> None:
    """USR1 after a logged step: saved and requeued, the same folder, every step once, the same weights and averages."""
    # The struck one has loader processes, to which SLURM sends the signal, too; they change no result.
    jobs = [submit(slurm, tmp_path, *settings, f"model.data.num_workers={workers}") for workers in (2, 0)]
    struck, whole = (tmp_path / "outputs" / "dreambooth" / job for job in jobs)
    slurm.wait(lambda: reached(struck, 3), 180, lambda: log_of(tmp_path, jobs[0]))
    slurm.call("scancel", "--signal=USR1", jobs[0])
    for job in jobs:
        slurm.wait(lambda job=job: slurm.finished(job), 300, lambda job=job: log_of(tmp_path, job))
    log = log_of(tmp_path, jobs[0])
    assert f"requeued job {jobs[0]}" in log
    assert f"going on in run folder {struck}" in log
    stopped = json.loads((struck / "summary.json").read_text())["resumed_from"]
    assert 3 <= stopped < STEPS
    for run in (struck, whole):
        assert [int(row["step"]) for row in rows_of(run / "metrics.csv")] == list(range(1, STEPS + 1))
    expected, found = weights(whole), weights(struck)
    assert expected.keys() == found.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []


def test_a_cancelled_job_saves_and_stays_away(slurm, settings, tmp_path) -> None:
    job = submit(slurm, tmp_path, "--nodes=1", *settings, "trainer.max_steps=2000")
    run = tmp_path / "outputs" / "dreambooth" / job
    slurm.wait(lambda: reached(run, 3), 180, lambda: log_of(tmp_path, job))
    slurm.call("scancel", job)
    slurm.wait(lambda: slurm.state(job) == "CANCELLED", 60)
    slurm.wait(lambda: any((run / "checkpoints").glob("step_*.ckpt")), 10, lambda: log_of(tmp_path, job))
    last = int(rows_of(run / "metrics.csv")[-1]["step"])
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{last:06d}.ckpt"]
    time.sleep(8)  # longer than a requeued job waits
    assert slurm.state(job) == "CANCELLED"
    assert "requeued" not in log_of(tmp_path, job)


def test_a_job_that_another_one_displaces_comes_back(slurm, settings, tmp_path) -> None:
    """It is sent TERM, as a cancelled one, and has the partition's GraceTime to save and leave."""
    job = submit(slurm, tmp_path, "--nodes=1", "--exclusive", *settings, "trainer.max_steps=400")
    run = tmp_path / "outputs" / "dreambooth" / job
    slurm.wait(lambda: reached(run, 3), 180, lambda: log_of(tmp_path, job))
    words = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"]
    other = slurm.call("sbatch", "--parsable", *words)
    slurm.wait(lambda: slurm.finished(other), 120, lambda: log_of(tmp_path, job))
    slurm.wait(lambda: slurm.finished(job), 200, lambda: log_of(tmp_path, job))
    assert f"requeued job {job}" in log_of(tmp_path, job)
    assert [int(row["step"]) for row in rows_of(run / "metrics.csv")] == list(range(1, 401))


def test_other_nodes_than_the_job_has_are_one_line(slurm, settings, tmp_path) -> None:
    job = submit(slurm, tmp_path, "--nodes=1", *settings, "trainer.num_nodes=2")
    slurm.wait(lambda: slurm.state(job) == "FAILED", 60, lambda: log_of(tmp_path, job))
    assert "dreambooth: trainer.num_nodes=2, but the job has 1 nodes: type trainer.num_nodes=1" in log_of(tmp_path, job)
    assert "Traceback" not in log_of(tmp_path, job)
    assert not (tmp_path / "outputs").exists()


def test_a_job_that_meets_its_time_limit_comes_back_until_it_is_done(slurm, settings, tmp_path) -> None:
    """SLURM's own signal, before a limit of one minute, which it looks for every half minute: more than once."""
    limit = ["--time=00:01:00", "--signal=USR1@10", "--nodes=1"]
    job = submit(slurm, tmp_path, *limit, *settings, "trainer.max_steps=1500")
    run = tmp_path / "outputs" / "dreambooth" / job
    slurm.wait(lambda: slurm.finished(job), 500, lambda: log_of(tmp_path, job))
    assert log_of(tmp_path, job).count(f"requeued job {job}") >= 1
    assert [int(row["step"]) for row in rows_of(run / "metrics.csv")] == list(range(1, 1501))


def test_the_benchmark_as_an_array(slurm, tiny_sd, tmp_path) -> None:
    """By the words of docs/slurm.md: two jobs deal out three subjects, and the later one's table is whole."""
    names = ["cat", "dog", "teapot"]
    for name in names:
        shutil.copytree(SUBJECTS / name, tmp_path / "dataset" / name)
    (tmp_path / "dataset" / "prompts_and_classes.txt").write_text(LAYOUT)
    words = [word for word in small(tiny_sd, tmp_path / "dataset", Path("outputs/benchmark")) if "base_dir" not in word]
    options = ["--array=0-1", "--nodes=1", "--ntasks-per-node=1"]
    alone = [
        "callbacks/evaluate=default",
        "metrics=pocket",
        "strategy=auto",
        "trainer.devices=1",
        "trainer.num_nodes=1",
    ]
    array = submit(slurm, tmp_path, *options, *alone, *words)
    for place in range(2):
        slurm.wait(lambda job=f"{array}_{place}": slurm.finished(job), 300, lambda: logs_of(tmp_path))
    folder = tmp_path / "outputs" / "benchmark"
    assert [row["subject"] for row in rows_of(folder / "benchmark.csv")][:3] == names
    assert [(folder / name / "summary.json").exists() for name in names] == [True] * 3
    assert logs_of(tmp_path).count("(1 of 2 here, 3 in all)") == 1
    assert logs_of(tmp_path).count("(1 of 1 here, 3 in all)") == 1


def test_the_launcher_submits_an_array_and_ends_with_the_table(slurm, settings, tmp_path) -> None:
    """Two jobs of two nodes; one is told to go on later by submitit's own signal, which must requeue it once."""
    pytest.importorskip("submitit", reason='needs pip install "dreambooth[slurm]"')
    command = [sys.executable, ROOT / "launch.py", "-m", "hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1"]
    command += ["hydra.launcher.timeout_min=20"]
    command += [*settings, "trainer.num_nodes=2", "strategy=ddp", "seed=1,2", "name=sweep"]
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(command, cwd=tmp_path, env=slurm.env, stdout=out, stderr=out, text=True)
    folder = tmp_path / "outputs" / "sweep"

    def said() -> str:
        return "".join(path.read_text() for path in [tmp_path / "out", *folder.glob(".submitit/*/*_log.*")])

    def begun() -> list[Path]:
        return [run for run in folder.glob("*") if reached(run, 3)]

    try:
        slurm.wait(lambda: bool(begun()), 180, said)
        struck = begun()[0]
        seed = re.search(r"^seed: (\d)", (struck / "config.yaml").read_text(), re.MULTILINE)[1]
        array = next((folder / ".submitit").glob("*_0")).name.partition("_")[0]
        slurm.call("scancel", "--signal=USR2", f"{array}_{int(seed) - 1}")
        slurm.wait(lambda: process.poll() is not None, 400, said)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.returncode == 0, said()
    rows = rows_of(folder / "sweep.csv")
    assert [(row["seed"], row["steps"], row["error"]) for row in rows] == [(s, str(STEPS), "") for s in "12"]
    assert (folder / "comparison.html").exists()
    assert json.loads((struck / "summary.json").read_text())["resumed_from"] >= 3
    assert [int(row["step"]) for row in rows_of(struck / "metrics.csv")] == list(range(1, STEPS + 1))
    assert said().count("requeued job") == 1
