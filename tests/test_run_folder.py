"""The run folder: the same command finds it again, and one folder holds one run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from omegaconf import DictConfig, OmegaConf

from dreambooth import run_folder
from dreambooth.errors import UserError
from dreambooth.run_folder import FOLDER_VARIABLE, LOCK, Run, claimed, find_run, is_rank_zero, open_run
from dreambooth.run_id import run_id

CLUSTER = ("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_PROCID", "TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "NODE_RANK")


@pytest.fixture(autouse=True)
def outside_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*CLUSTER, FOLDER_VARIABLE):
        monkeypatch.delenv(name, raising=False)


def settings(**changes: object) -> DictConfig:
    cfg = OmegaConf.create(
        {
            "task": "train",
            "resume": True,
            "seed": 1,
            "trainer": {"max_steps": 4, "max_epochs": None},
            "model": {"optim": {"lr": 1e-5}, "data": {"num_workers": 0, "prompt": "sks, ${seed}"}},
            "infer": {"seed": 0},
        }
    )
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    return cfg


ROW = "step,loss\n1,0.5\n"


def finish(folder: Path, steps: int) -> None:
    (folder / "summary.json").write_text(json.dumps({"steps": steps}))


def test_id_is_that_of_the_job_or_a_hash_of_what_changes_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run_id("model=pocket,model.data.instance_prompt=a dog, sks=1")
    how = "hydra.verbose=true,infer.prompts=[a,b,c],model.data.instance_prompt=a dog, sks=1,model=pocket,task=generate"
    assert run_id(how) == run_id(how + ",trainer.log_every_n_steps=5,model=pocket") == plain
    different = {run_id(text) for text in ("", "seed=2", "+seed=2,seed=3", "~callbacks.export,seed=2", "task=pretrain")}
    assert len(different | {plain, run_id("trainer.max_steps=7")}) == 7
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert run_id("seed=2") in different
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")
    assert run_id("seed=2") == "abc"
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    assert run_id("seed=2") == "71"
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")
    assert run_id("seed=2") == "abc"
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert run_id("seed=2") == "70_3"


def test_same_settings_go_on_finish_and_can_be_raised(tmp_path: Path) -> None:
    folder = tmp_path / "outputs" / "run"
    assert open_run(settings(), folder) == Run(folder)
    assert OmegaConf.load(folder / "config.yaml").model.data.prompt == "sks, 1"
    assert open_run(settings(model__data__num_workers=3, task="prepare", infer__seed=9), folder) == Run(folder)
    finish(folder, 4)
    assert open_run(settings(), folder) == Run(folder, {"steps": 4})
    (folder / "metrics.csv").write_text(ROW)
    assert open_run(settings(trainer__max_steps=6), folder) == Run(folder)
    assert not (folder / "summary.json").exists()
    assert OmegaConf.load(folder / "config.yaml").trainer.max_steps == 6
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "metrics.csv"]
    logger = {"tensorboard": {"_target_": "somebody.Else"}}
    assert open_run(settings(trainer__max_steps=6, logger=logger), folder) == Run(folder)  # shows, and changes nothing
    for damaged in ("{", "3", "{}"):
        (folder / "summary.json").write_text(damaged)
        assert open_run(settings(trainer__max_steps=6), folder) == Run(folder)  # not finished: it ends once more
    with pytest.raises(UserError, match=r"trainer\.max_steps 6 → 4"):
        open_run(settings(), folder)


def test_a_run_that_stopped_goes_on_with_another_stop_but_not_for_a_key_that_it_is_older_than(tmp_path: Path) -> None:
    open_run(settings(callbacks__evaluate__patience=3), tmp_path)
    (tmp_path / "metrics.csv").write_text(ROW)
    summary = {"steps": 2, "stopped": "likeness has not risen"}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    newer = {"callbacks__evaluate__patience": 3, "callbacks__evaluate__max_forgetting": 0.5}
    assert open_run(settings(callbacks__evaluate__patience=3), tmp_path) == Run(tmp_path, summary)
    assert open_run(settings(**newer), tmp_path) == Run(tmp_path, summary)
    assert open_run(settings(**newer | {"callbacks__evaluate__patience": None}), tmp_path) == Run(tmp_path)


def test_a_run_from_before_samples_had_a_batch_size_is_gone_on_with(tmp_path: Path) -> None:
    open_run(settings(), tmp_path)
    (tmp_path / "metrics.csv").write_text(ROW)
    assert open_run(settings(callbacks__sample_grid__batch_size=28), tmp_path) == Run(tmp_path)


def test_other_settings_are_refused_by_name_and_leave_the_folder_alone(tmp_path: Path) -> None:
    open_run(settings(model__optim__lr=7), tmp_path)
    open_run(settings(), tmp_path)  # nothing but a config: that run never began
    (tmp_path / "metrics.csv").write_text(ROW)
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(
        UserError, match=r"model\.optim\.lr 1e-05 → 0\.1; extra \(absent\) → 3\).*hydra\.run\.dir="
    ) as caught:
        open_run(settings(model__optim__lr=0.1, extra=3, trainer__max_steps=9), tmp_path)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "config.yaml").read_bytes() == before
    (tmp_path / "config.yaml").write_text("{")
    for damaged in ("{", "", "[1]", "model", "other: 1"):
        (tmp_path / "config.yaml").write_text(damaged)
        with pytest.raises(UserError, match=r"cannot be read .*resume=false"):
            open_run(settings(), tmp_path)


def test_a_folder_in_which_nothing_was_trained_is_begun_anew(tmp_path: Path) -> None:
    """What an error before the first step left there holds no folder; a picture of the base is of its settings."""
    open_run(settings(model__optim__lr=7), tmp_path)
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "hparams.yaml").touch()
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "step_000000.png").touch()
    (tmp_path / "metrics.csv").write_text("step,loss\n")
    open_run(settings(model__optim__lr=7), tmp_path)  # the same command: what is drawn is kept
    assert (tmp_path / "samples" / "step_000000.png").exists()
    assert open_run(settings(), tmp_path) == Run(tmp_path)
    assert OmegaConf.load(tmp_path / "config.yaml").model.optim.lr == 1e-5
    assert not (tmp_path / "samples").exists()
    assert open_run(settings(resume=False), tmp_path).folder == tmp_path.with_name(f"{tmp_path.name}-2")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_000001.ckpt").touch()
    with pytest.raises(UserError, match="other settings"):
        open_run(settings(model__optim__lr=7), tmp_path)


def test_afresh_takes_the_next_free_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    taken = []
    for job in "123":
        monkeypatch.setenv("SLURM_JOB_ID", job)
        run = open_run(settings(resume=False), folder)
        (run.folder / "metrics.csv").touch()
        taken.append(run.folder.name)
    assert taken == ["run", "run-2", "run-3"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # the job that made run-3, or another, is started again
    for job, name in (("3", "run-3"), ("2", "run-2"), ("4", "run-4")):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        assert find_run(settings(resume=False), folder).folder.name == name
    assert open_run(settings(resume=False), tmp_path / "new").folder.name == "new"
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    monkeypatch.delenv("SLURM_JOB_ID")
    assert open_run(settings(), tmp_path / "run-2").summary is None


def test_other_ranks_write_nothing_and_follow_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not is_rank_zero()
    assert open_run(settings(), tmp_path / "run") == Run(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("LOCAL_RANK", "0")
    open_run(settings(), tmp_path / "run")
    (tmp_path / "run" / "metrics.csv").touch()
    assert open_run(settings(resume=False), tmp_path / "run").folder.name == "run-2"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert open_run(settings(resume=False), tmp_path / "run").folder.name == "run-2"
    assert find_run(settings(), tmp_path / "next").folder.name == "next"  # a program's next run, or a child's first one
    monkeypatch.setenv("RANK", "0")
    assert is_rank_zero()


def test_two_commands_do_not_train_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "PATIENCE", 0.1)
    run, other = tmp_path / "run", FileLock(tmp_path / "run" / LOCK)
    with claimed(run), pytest.raises(UserError, match="another process trains in this run folder"), claimed(run):
        pass
    assert not run.exists()  # nothing began there
    run.mkdir()
    with other, pytest.raises(UserError, match=r"hydra\.run\.dir="), claimed(run):
        pass
    monkeypatch.setenv("LOCAL_RANK", "1")
    with other, claimed(run):  # the first rank has it for all
        pass
    monkeypatch.delenv("LOCAL_RANK")
    with claimed(run):
        (run / "config.yaml").touch()
    with claimed(run):
        pass
    assert [path.name for path in run.iterdir()] == ["config.yaml"]
    with pytest.raises(UserError, match="mine"), claimed(run / "config.yaml" / "x"):
        raise UserError("mine")


def test_a_folder_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"hydra\.run\.dir"):
        find_run(settings(), tmp_path / "file" / "run")
    with pytest.raises(UserError, match=r"^hydra\.run\.dir: /proc/run cannot be written \(.*\); type another hydra"):
        find_run(settings(), Path("/proc/run"))


def test_the_id_needs_no_torch() -> None:
    code = "import sys, dreambooth.run_folder; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "False"
