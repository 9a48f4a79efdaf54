"""Sweeps (-m): a folder for every job, one table at the end, and what cannot be swept is said in one line."""

import csv
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import MissingConfigException

from dreambooth import cli, nearest
from dreambooth.benchmark import results
from dreambooth.config import CONF
from dreambooth.errors import UserError
from dreambooth.metrics.method import ways
from dreambooth.report.sweep import finish
from tests.runs import make_run
from tests.tiny import short_run

LAUNCH = Path(__file__).resolve().parents[1] / "launch.py"


def record(folder: Path, *overrides: str, task: str = "train", error: str | None = None) -> dict:
    return {"task": task, "overrides": list(overrides), "folder": str(folder), "error": error, "code": 0}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_shows_what_differs_and_the_best(tmp_path: Path) -> None:
    one, two = (make_run(tmp_path / name, lr=lr) for name, lr in (("one", 2e-4), ("two", 3e-4)))
    same = ("model=pocket", "name=x")
    records = [
        record(one, *same, "model.optim.lr=2e-4", "model/weighting=uniform"),
        record(two, *same, "model.optim.lr=3e-4", "model/weighting=min_snr"),
        record(tmp_path / "three", *same, "model.optim.lr=-1", "model/weighting=uniform", error="must be a | above 0"),
    ]
    text = finish(tmp_path, records).read_text().splitlines()
    assert cells(text[0])[:3] == ["lr", "weighting", "dino"]
    head, first, second = (cells(text[line]) for line in (0, 2, 3))
    assert dict(zip(head, first, strict=True)) | {"run": "one", "best step": "40", "lr": "2e-4"} == dict(
        zip(head, first, strict=True)
    )
    assert (first[2], second[2]) == ("0.700 (0.679 to 0.721)", "**0.800** (0.779 to 0.821)")
    assert first[head.index("clip_t")].startswith("0.300")  # the same in all: none is best
    assert text[4].endswith(r"| failed: must be a \| above 0 |")
    rows = rows_of(tmp_path / "sweep.csv")
    assert list(rows[0])[:2] == ["model.optim.lr", "model/weighting"]
    assert [row["dino"] for row in rows] == ["0.7", "0.8", ""]
    assert float(rows[1]["dino_low"]) == pytest.approx(0.779)
    assert rows[2]["error"] == "must be a | above 0"
    page = (tmp_path / "comparison.html").read_text()
    assert "one/report.html" in page
    assert "two/report.html" in page


def test_benchmarks_show_the_mean_of_their_subjects(tmp_path: Path) -> None:
    for name, dino in (("a", 0.5), ("b", 0.6)):
        (tmp_path / name).mkdir()
        mean = {"subject": "mean", "dino": dino, "div": None, "dino_interval": [0.4, 0.7], "div_interval": None}
        (tmp_path / name / "benchmark.json").write_text(json.dumps([{"subject": "dog", "dino": 1.0}, mean]))
    records = [record(tmp_path / name, f"seed={place}", task="benchmark") for place, name in enumerate("ab")]
    text = finish(tmp_path, records).read_text().splitlines()
    assert [cells(line) for line in text[2:]] == [
        ["0", "0.500 (0.400 to 0.700)", "a"],
        ["1", "**0.600** (0.400 to 0.700)", "b"],
    ]
    assert not (tmp_path / "comparison.html").exists()


def test_pages_of_benchmarks_call_a_subjects_runs_by_their_settings_and_say_how_they_were_measured(
    tmp_path: Path,
) -> None:
    records = []
    for prior in ("true", "false"):
        run = make_run(tmp_path / prior / "dog")
        told = json.loads((run / "summary.json").read_text())
        told["metrics"] |= {"encoders": {"dino": "a ViT"}, "text": "class", "average": "pictures"}
        (run / "summary.json").write_text(json.dumps(told))
        rows = results.table({"dog": run})
        results.write(tmp_path / prior, rows, ways([results.measured(run)]))
        records.append(record(tmp_path / prior, f"model.with_prior_preservation={prior}", "seed=1", task="benchmark"))
    finish(tmp_path, records)
    page = (tmp_path / "comparison-dog.html").read_text()
    for prior in ("true", "false"):
        assert page.count(f"with_prior_preservation {prior}") > 8  # the row, the column, the curve, the pictures
    assert ">dog<" not in page
    how = "easured by dino: a ViT; clip_t's prompt is taken without the rare word; means count every picture once."
    for text in (
        page.replace("&#39;", "'"),
        *((tmp_path / name).read_text() for name in ("paired.md", "true/benchmark.md")),
    ):
        assert how in text


@pytest.fixture
def sweep(tiny_sd: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Type ``dreambooth -m`` with a short run and more, in ``tmp_path``: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    usual = [text for text in short_run(tiny_sd, photos, tmp_path / "run") if not text.startswith("hydra")]
    usual += ["trainer.max_steps=1", "callbacks.sample_grid=null", "callbacks.evaluate=null", "logger=none"]

    def typed(*more: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(LAUNCH), "-m", *usual, *more])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return (code, *capsys.readouterr())

    return typed


@pytest.mark.slow
def test_every_job_has_its_folder_and_one_that_fails_ends_no_other(sweep, tmp_path: Path, monkeypatch) -> None:
    for name, value in (("SLURM_JOB_ID", "7"), ("SLURM_JOB_NAME", "sweep")):  # several jobs in one of SLURM's
        monkeypatch.setenv(name, value)
    code, out, err = sweep("model.optim.lr=-1,1e-3,2e-3", "name=lr")
    folder = tmp_path / "outputs" / "lr"
    assert (code, out.splitlines()[-1]) == (2, str(folder / "sweep.md")), err
    assert "dreambooth: model.optim.lr=-1: must be above 0" in err
    assert err.splitlines()[-1] == "dreambooth: 1 of 3 jobs of the sweep failed"
    rows = rows_of(folder / "sweep.csv")
    assert [row["error"] for row in rows] == ["model.optim.lr=-1: must be above 0", "", ""]
    runs = sorted(Path(row["run"]) for row in rows[1:])
    files = ["comparison.html", "multirun.yaml", "sweep.csv", "sweep.md"]
    assert sorted(folder.iterdir()) == sorted([*runs, *(folder / name for name in files)])
    assert all((run / "pipeline").is_dir() for run in runs)
    before = [(run / "summary.json").read_bytes() for run in runs]
    assert sweep("model.optim.lr=1e-3,2e-3", "name=lr")[0] == 0
    assert [(run / "summary.json").read_bytes() for run in runs] == before  # finished runs are left alone
    assert len(rows_of(folder / "sweep.csv")) == 2


@pytest.mark.slow
def test_processes_that_lightning_would_start_are_refused(sweep, tmp_path: Path) -> None:
    code, out, err = sweep("seed=1,2", "trainer.devices=2")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("dreambooth: trainer.devices=2 in a sweep")
    assert "hydra/launcher=slurm" in err
    assert not (tmp_path / "outputs").exists()
    code, out, err = sweep("seed=1,2", "trainer.devices=1,2")
    assert (code, out, err.count("\n")) == (2, "", 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("trainer.num_nodes=1,2", "trainer.num_nodes=2 in a sweep whose jobs are all submitted with 1: type one sweep"),
        ("trainer.num_nodes=2,4", "trainer.num_nodes=2 in a sweep whose jobs are all submitted with 1: type one sweep"),
        ("trainer.devices=1,2", "trainer.devices=2 in a sweep whose jobs are all submitted with 1: type one sweep"),
        (
            "trainer.devices=auto",
            "trainer.devices=auto: SLURM is asked for a number; type hydra.launcher.tasks_per_node=",
        ),
        ("trainer.devices=-1", "trainer.devices=-1: SLURM is asked for a number; type hydra.launcher.tasks_per_node="),
        ("trainer.devices='-1'", "trainer.devices=-1: SLURM is asked for a number; type hydra.launcher.tasks_per_nod"),
        ("trainer.devices=[0,1]", "trainer.devices=[0, 1]: SLURM is asked for a number; type hydra.launcher.tasks_per"),
        ("hydra.launcher.nodes=2", "trainer.num_nodes=1, but hydra.launcher.nodes=2: type trainer.num_nodes=2, or"),
    ],
)
def test_jobs_that_would_be_submitted_with_other_processes_are_refused(sweep, tmp_path, typed: str, line: str) -> None:
    pytest.importorskip("submitit", reason='needs pip install "dreambooth[slurm]"')
    code, out, err = sweep("hydra/launcher=slurm", "seed=1,2", typed)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"dreambooth: {line}")
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "typed",
    [
        ["trainer.num_nodes=2", "trainer.devices=4"],
        ["trainer.num_nodes=2", "hydra.launcher.nodes=2"],
        ["trainer.devices=[0,1]", "hydra.launcher.tasks_per_node=2"],
        ["trainer.devices=auto", "hydra.launcher.tasks_per_node=4"],
        ["trainer.devices=-1", "hydra.launcher.tasks_per_node=4"],
        ["task=benchmark", "hydra.launcher.tasks_per_node=2"],
    ],
)
def test_jobs_that_are_submitted_with_their_processes_are_not(
    sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: list[str]
) -> None:
    """They come as far as srun, which is not to be found."""
    pytest.importorskip("submitit", reason='needs pip install "dreambooth[slurm]"')
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = sweep("hydra/launcher=slurm", "seed=1,2", *typed)
    assert (code, err.count("\n"), "there is no srun here" in err) == (2, 1, True), err


def test_a_model_that_the_jobs_would_not_find_is_refused_before_they_are_submitted(sweep, tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason='needs pip install "dreambooth[slurm]"')
    code, out, err = sweep("hydra/launcher=slurm", "model.from_pretrained=nobody/nothing", "model.revision=main")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("dreambooth: model.from_pretrained=nobody/nothing is not in ")
    assert err.endswith("type where there is a network: hf download nobody/nothing --revision main\n")
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_a_model_that_is_not_cached_is_said_before_jobs_are_submitted_that_may_not_find_it(
    sweep, tmp_path: Path, monkeypatch
) -> None:
    """Where there is a network the jobs may have one, too: they are submitted."""
    pytest.importorskip("submitit", reason='needs pip install "dreambooth[slurm]"')
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name, text in {"srun": "exit 0", "sbatch": "echo submitted >&2; exit 1"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    _, out, err = sweep("hydra/launcher=slurm", "model.from_pretrained=nobody/nothing", "seed=1,2")
    (line,) = (line for line in out.splitlines() if "the hub's cache" in line)
    assert line.endswith("type hf download nobody/nothing first")
    assert "submitted" in err


@pytest.mark.slow
@pytest.mark.parametrize("models", ["/nowhere/sd15", "pocket,./nowhere", "nowhere/a/b,pocket"])
def test_a_folder_that_is_not_there_is_refused_before_anything_is_submitted(sweep, tmp_path: Path, models: str) -> None:
    """Of the values that are swept, too."""
    pytest.importorskip("submitit", reason='needs pip install "dreambooth[slurm]"')
    code, out, err = sweep("hydra/launcher=slurm", f"model.from_pretrained={models}", "seed=1,2")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("dreambooth: No model at '")
    assert "nowhere" in err
    assert not (tmp_path / "outputs").exists()


def test_what_sbatch_refuses_is_one_line(sweep, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("submitit", reason='needs pip install "dreambooth[slurm]"')
    programs = {"srun": "exit 0", "sbatch": "echo 'sbatch: error: invalid partition: nope' >&2; exit 1"}
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    code, _, err = sweep("hydra/launcher=slurm", "hydra.launcher.partition=nope", "seed=1,2")
    assert (code, "Traceback" in err) == (2, False)
    (line,) = (line for line in err.splitlines() if line.startswith("dreambooth: "))
    assert line.startswith(
        "dreambooth: hydra/launcher=slurm: sbatch: error: invalid partition: nope; see hydra.launcher."
    )


@pytest.fixture
def died(sweep, tmp_path: Path, monkeypatch):
    """Type a sweep of two jobs of which SLURM says, after the first has ended well, that the second ran out of memory.

    It may be given what the second one wrote on stderr and the state it is in.
    """
    job = pytest.importorskip("submitit", reason='needs pip install "dreambooth[slurm]"').Job
    monkeypatch.setattr(job, "results", job.results)  # as it was, after the test
    monkeypatch.setattr(job, "_results_timeout_s", 0)
    logs = tmp_path / "outputs" / "dead" / ".submitit"
    for place in ("77_0", "77_1"):
        (logs / place).mkdir(parents=True)
    ended = ("success", JobReturn(status=JobStatus.COMPLETED))
    (logs / "77_0" / "77_0_0_result.pkl").write_bytes(pickle.dumps(ended))
    run = make_run(tmp_path / "one", lr=2e-4)
    (tmp_path / "0.json").write_text(json.dumps(record(run, "seed=1")))

    def typed(stderr: str = "", state: str = "OUT_OF_MEMORY") -> tuple[int, str, str]:
        (logs / "77_1" / "77_1_1_log.err").write_text(stderr)
        records = tmp_path / "outputs" / "dead" / ".sweep"
        programs = {
            "srun": "exit 0",
            "sbatch": f"mkdir {records}; cp {tmp_path}/0.json {records}/000000.json; echo Submitted batch job 77",
            "sacct": f"echo 'JobID|State'; echo '77_0|COMPLETED'; echo '77_1|{state}'",
        }
        for name, text in programs.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return sweep("hydra/launcher=slurm", "name=dead", "seed=1,2")

    return typed


@pytest.mark.slow
def test_a_submitted_job_that_dies_is_a_row_and_the_sweep_ends_with_its_table(died, tmp_path: Path) -> None:
    code, out, err = died("slurmstepd: error: Detected 1 oom_kill event\n")
    folder = tmp_path / "outputs" / "dead"
    assert (code, "Traceback" in err, out.splitlines()[-1]) == (1, False, str(folder / "sweep.md")), err
    line = f"did not end (OUT_OF_MEMORY); its logs lie in {folder}/.submitit/77_1"
    assert [text for text in err.splitlines() if text.startswith("dreambooth: ")] == [
        f"dreambooth: job 1 of the sweep: {line}",
        "dreambooth: 1 of 2 jobs of the sweep failed",
    ]
    rows = rows_of(folder / "sweep.csv")
    assert [(row["seed"], row["error"]) for row in rows] == [("1", ""), ("2", line)]
    assert f"failed: {line}" in (folder / "sweep.md").read_text()
    assert not (folder / ".sweep").exists()


@pytest.mark.slow
def test_what_a_rank_of_a_submitted_job_refused_is_its_error(died, tmp_path: Path) -> None:
    code, _, err = died("dreambooth: photos/1.jpg cannot be read\nsrun: error: n1: task 1\n", "FAILED")
    assert (code, "Traceback" in err) == (2, False), err
    rows = rows_of(tmp_path / "outputs" / "dead" / "sweep.csv")
    assert [row["error"] for row in rows] == ["", "photos/1.jpg cannot be read"]


@pytest.mark.slow
def test_ctrl_c_while_the_launcher_waits_leaves_without_a_traceback(died, monkeypatch) -> None:
    from submitit import Job

    def wait(self) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Job, "wait", wait)
    code, _, err = died()
    assert (code, "Traceback" in err) == (130, False)


def test_the_launcher_without_its_packages_is_one_line() -> None:
    missing = MissingConfigException("", "hydra/launcher/submitit_slurm", [])
    assert (
        nearest.explain(missing, {}, [], CONF)
        == 'hydra/launcher=slurm needs two more packages: pip install "dreambooth[slurm]"'
    )


@pytest.mark.exhaustive
def test_a_sweep_of_submitits_own_processes(sweep, tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason='needs pip install "dreambooth[slurm]"')
    code, _, err = sweep("hydra/launcher=submitit_local", "seed=1,2")
    assert code == 0, err
    rows = rows_of(tmp_path / "outputs" / "dreambooth" / "sweep.csv")
    assert [(row["seed"], row["steps"], row["error"]) for row in rows] == [("1", "1", ""), ("2", "1", "")]


@pytest.mark.exhaustive
def test_a_sweep_of_two_ranks_under_torchrun(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    """Each job trains on both ranks; the ranks share its folder."""
    usual = [text for text in short_run(tiny_sd, photos, tmp_path / "run") if not text.startswith("hydra")]
    usual += ["trainer.max_steps=2", "callbacks.sample_grid=null", "callbacks.evaluate=null", "logger=none"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(LAUNCH), "-m", *usual]
    command += ["trainer.devices=2", "strategy=ddp", "seed=1,2"]
    env = os.environ | {"PYTHONPATH": str(LAUNCH.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "outputs" / "dreambooth" / "sweep.csv")
    assert [(row["seed"], row["steps"], row["error"]) for row in rows] == [("1", "2", ""), ("2", "2", "")]


@pytest.mark.slow
@pytest.mark.parametrize(("fails", "jobs"), [("every rank", 2), ("this rank", 1)])
def test_what_every_rank_refuses_ends_no_sweep_that_torchrun_started(sweep, monkeypatch, fails: str, jobs: int) -> None:
    """A rank that failed alone would be waited for: it ends, and torchrun the others."""
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)

    def task(cfg) -> None:
        raise UserError(f"model.optim.lr={cfg.model.optim.lr}: no room")

    monkeypatch.setattr(cli, "_task", lambda name: task)
    code, _, err = sweep("trainer.devices=2", f"model.optim.lr={'-1,-2' if fails == 'every rank' else '1,2'}")
    assert (code, err.count("dreambooth: model.optim.lr=")) == (0 if fails == "every rank" else 2, jobs), err


@pytest.mark.slow
def test_a_sweep_of_failures_leaves_no_older_table_standing(sweep, tmp_path: Path) -> None:
    folder = tmp_path / "outputs" / "bad"
    folder.mkdir(parents=True)
    (folder / "sweep.md").write_text("of jobs that were typed before")
    code, _, err = sweep("model.optim.lr=-1,-2", "name=bad")
    assert (code, err.splitlines()[-1]) == (2, "dreambooth: 2 of 2 jobs of the sweep failed")
    assert [row["error"] for row in rows_of(folder / "sweep.csv")] == [
        f"model.optim.lr={rate}: must be above 0" for rate in (-1, -2)
    ]
    assert (folder / "sweep.md").read_text().count("failed: ") == 2


def test_a_benchmark_that_fails_in_a_sweep_leaves_no_older_comparison_standing(tmp_path: Path) -> None:
    """They would be of the jobs before, beside the new table."""
    records = []
    for seed in (1, 2):
        run = make_run(tmp_path / str(seed) / "dog")
        results.write(run.parent, results.table({"dog": run}))
        records.append(record(run.parent, f"model.prior_loss_weight={seed}", task="benchmark"))
    finish(tmp_path, records)
    usual = {"comparison-dog.html", "paired.csv", "paired.md", "sweep.csv", "sweep.md"}
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == usual
    finish(tmp_path, [records[0], records[1] | {"error": "no room", "folder": str(tmp_path / "3")}])
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"sweep.csv", "sweep.md"}


def test_a_run_without_a_summary_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    finish(tmp_path, [record(tmp_path / "one", "seed=1"), record(tmp_path / "one", "seed=2")])
    assert [row["seed"] for row in rows_of(tmp_path / "sweep.csv")] == ["1", "2"]
