"""What a strategy cannot do is said in one line, before anything is loaded or written."""

import re
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from dreambooth import UserError, compose, train
from dreambooth.parallel import checks, zero
from dreambooth.run_folder import open_run
from dreambooth.tuning.full import Full

GPUS = "trainer.accelerator=gpu"
LIGHTNINGS = "pytorch_lightning.strategies"


class Own(Full):
    """Somebody's way of tuning that says nothing of parts."""

    supports_sharding = False


@pytest.mark.parametrize(
    ("overrides", "gpus", "words"),
    [
        ([GPUS], 0, ["there is no GPU here", "trainer.accelerator=cpu"]),
        ([GPUS, "trainer.devices=4"], 2, ["trainer.devices=4", "2 GPUs"]),
        ([GPUS, "trainer.devices=[0,2]"], 2, ["trainer.devices=[0, 2]", "2 GPUs"]),
        (["trainer.devices=4"], 2, ["trainer.devices=4", "2 GPUs"]),
        (["trainer.devices='0,7'"], 2, ["trainer.devices=0,7", "2 GPUs", "trainer.devices=2"]),
        (["trainer.devices='4'"], 2, ["trainer.devices=4", "2 GPUs"]),
        (["trainer.devices=6400"], 0, ["trainer.devices=6400", "CPUs", "or fewer"]),
        (["trainer.devices=6400", "trainer.accelerator=cpu"], 2, ["trainer.devices=6400", "CPUs"]),
        (["trainer.num_nodes=2"], 0, ["trainer.num_nodes=2", "srun", "torchrun --nnodes", "MASTER_ADDR"]),
        (["trainer.strategy=fsdp"], 0, ["trainer.strategy=fsdp", "type strategy=fsdp"]),
        (["trainer.strategy=fsdp_cpu_offload"], 0, ["type strategy=fsdp"]),
        (["trainer.strategy=deepspeed"], 2, ["type strategy=deepspeed_2"]),
        (
            ["trainer.strategy=deepspeed_stage_2"],
            2,
            ["trainer.strategy=deepspeed_stage_2", "type strategy=deepspeed_2"],
        ),
        (["trainer.strategy=deepspeed_stage_3_offload_nvme"], 2, ["type strategy=deepspeed_3_offload"]),
        (["trainer.strategy=ddp_spawn"], 0, ["trainer.strategy=ddp_spawn", "type strategy=ddp"]),
        (["strategy=fsdp", "trainer.precision=16-mixed"], 0, ["16-mixed", "fsdp", "bf16-mixed"]),
        (["strategy=deepspeed_2", "trainer.precision=16-mixed"], 2, ["16-mixed", "bf16-mixed"]),
        (["trainer.precision=16-mixed"], 0, ["trainer.precision=16-mixed needs a GPU", "bf16-mixed"]),
        (["trainer.precision=16-mixed", "trainer.accelerator=cpu"], 2, ["needs a GPU"]),
        (["callbacks.sample_grid.resolution=63"], 0, ["callbacks.sample_grid.resolution=63", "56 or", "64"]),
        (["+model.data.foo=1"], 0, ["model.data: ", "'foo'", "leave it out with ~model.data.KEY"]),
        (["+model.tuning.foo=1"], 0, ["model.tuning: ", "'foo'"]),
        (["strategy=fsdp", "model/optim=adafactor"], 0, ["model.optim", "strategy=fsdp", "model/optim=adamw"]),
        (
            ["strategy=fsdp", "model.tuning._target_=tests.test_checks.Own"],
            0,
            ["Own", "one of the cards"],
        ),
        (
            ["strategy=fsdp", f"trainer.strategy._target_={LIGHTNINGS}.FSDPStrategy"],
            0,
            ["FSDPStrategy", "strategy=fsdp"],
        ),
        (
            ["strategy=deepspeed_1", f"trainer.strategy._target_={LIGHTNINGS}.DeepSpeedStrategy"],
            2,
            ["DeepSpeedStrategy", "strategy=deepspeed_2"],
        ),
        (["strategy=fsdp_hybrid", "model/tuning=pivotal"], 0, ["model.tuning.embedding_steps=null", "strategy=ddp"]),
        (["strategy=deepspeed_3", "model.prior=teacher"], 2, ["model.prior=teacher", "model/tuning=lora"]),
        (
            ["strategy=fsdp", "model.prior=teacher", "model/tuning=lora", "model.train_text_encoder=true"],
            0,
            ["model.prior=teacher", "model.tuning.train_text_encoder=false"],
        ),
        (
            ["strategy=fsdp", "model.prior=teacher", "model/tuning=pivotal", "model.tuning.embedding_steps=null"],
            0,
            ["model.prior=teacher", "strategy=ddp"],
        ),
        (
            ["strategy=fsdp", "model.tuning.stop_text_encoder_at=2", "model.train_text_encoder=true"],
            0,
            ["stop_text_encoder_at", "strategy=ddp"],
        ),
        (
            ["strategy=fsdp", "trainer.devices=2", "trainer.strategy.replicate=3"],
            0,
            ["trainer.strategy.replicate=3: 2 ranks", "trainer.strategy.replicate=null"],
        ),
        (["strategy=fsdp", "trainer.devices=auto", "trainer.strategy.replicate=3"], 4, ["replicate=3: 4 ranks"]),
        (["strategy=deepspeed_2"], 0, ["needs a GPU", "strategy=fsdp"]),
        (["strategy=deepspeed_3", "trainer.accelerator=cpu"], 2, ["needs a GPU"]),
        (["strategy=deepspeed_3_offload", "model.ema.decay=0.9"], 2, ["model.ema.decay", "strategy=deepspeed_2"]),
        (["strategy=deepspeed_1", "+trainer.gradient_clip_algorithm=value"], 2, ["gradient_clip_algorithm", "norm"]),
    ],
)
def test_what_cannot_be_done(
    overrides: list[str], gpus: int, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    with pytest.raises(UserError) as caught:
        train(compose([*overrides, f"hydra.run.dir={tmp_path / 'run'}"]))
    line = str(caught.value)
    assert "\n" not in line
    assert all(word in line for word in words), line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    ["full", "lora", "lora model.prior=teacher", "textual_inversion", "pivotal model.tuning.embedding_steps=null"],
)
def test_what_a_strategy_that_cuts_knows(words: str) -> None:
    checks.check(compose(["strategy=fsdp", *f"model/tuning={words}".split(), "trainer.accelerator=cpu"]))


def test_a_task_that_sees_one_gpu_of_its_node_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    job = {"JOB_ID": "7", "JOB_NAME": "train", "STEP_ID": "0", "NTASKS": "4", "NTASKS_PER_NODE": "4"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(UserError, match=r"each task sees 1: type sbatch --gpus-per-node=4, without --gpus-per-task"):
        checks.check(compose(["trainer.accelerator=gpu", "trainer.devices=4", "strategy=ddp"]))


@pytest.mark.parametrize("name", checks.WHOLE)
def test_strategies_that_a_name_is_enough_for(name: str) -> None:
    checks.check(compose([f"trainer.strategy={name}", "trainer.accelerator=cpu"]))


@pytest.mark.parametrize(("gpus", "devices"), [(0, "2"), (8, "'0,7'"), (8, "auto"), (8, "-1"), (2, "[0,1]")])
def test_what_is_there_may_be_asked_for(gpus: int, devices: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes on any machine, of one CPU, too."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(checks.os, "cpu_count", lambda: 1)
    checks.check(compose([f"trainer.devices={devices}"]))


def test_several_nodes_whose_processes_somebody_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "NODE_RANK"):
        monkeypatch.setenv(name, "0")
    checks.check(compose(["trainer.num_nodes=2"]))
    monkeypatch.delenv("NODE_RANK")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    checks.check(compose(["trainer.num_nodes=2"]))


def test_groups_are_made_of_the_ranks_of_all_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "7", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "6"}.items():
        monkeypatch.setenv(name, value)
    words = ["strategy=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.num_nodes=3"]
    checks.check(compose([*words, "trainer.strategy.replicate=3"]))
    with pytest.raises(UserError, match=r"^trainer\.strategy\.replicate=4: 6 ranks .*; type what divides 6, or"):
        checks.check(compose([*words, "trainer.strategy.replicate=4"]))


def test_a_package_that_is_missing_is_named_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(zero, "version", absent)
    with pytest.raises(UserError, match=r"strategy=deepspeed_2 .* pip install 'dreambooth\[deepspeed\]'"):
        checks.check(compose(["strategy=deepspeed_2"]))


@pytest.mark.parametrize(
    ("found", "line"),
    [("0.19.7", r"DeepSpeed 0\.19\.7 would .* pip install 'deepspeed>=0\.19\.8'$"), ("0.19.10+cu13", "needs a GPU")],
)
def test_a_deepspeed_that_learns_from_what_is_no_number_is_refused(found: str, line: str, monkeypatch) -> None:
    monkeypatch.setattr(zero, "version", lambda name: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=line):
        checks.check(compose(["strategy=deepspeed_3"]))


def test_the_oldest_deepspeed_is_the_one_that_is_installed_by_the_extra() -> None:
    setup = Path(__file__).parents[1].joinpath("setup.cfg").read_text()
    asked = re.findall(r"deepspeed>=(\S+)", setup)
    assert asked == [zero.OLDEST] * 2


def test_a_folder_may_be_gone_on_with_by_other_ranks(tmp_path: Path) -> None:
    """The way of sharing may change in a folder; its settings say the last one."""
    folder = f"hydra.run.dir={tmp_path}"
    cfg = compose([folder])
    open_run(cfg, tmp_path)
    (tmp_path / "metrics.csv").write_text("step,loss\n1,0.5\n")
    other = compose([folder, "strategy=fsdp", "trainer.devices=2", "model.micro_batch_size=2"])
    assert open_run(other, tmp_path).summary is None
    assert "FsdpStrategy" in (tmp_path / "config.yaml").read_text()
    with pytest.raises(UserError, match="other settings"):
        open_run(compose([folder, "strategy=ddp", "model.optim.lr=1"]), tmp_path)


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ([], r"^trainer\.devices=1, but torchrun started 2 processes here: type trainer\.devices=2, or .*=1$"),
        (["trainer.devices=2"], r"^trainer\.num_nodes=1, but torchrun started processes on 3 nodes: .*num_nodes=3"),
        (["trainer.devices=2", "trainer.num_nodes=3"], None),
        (["trainer.devices=auto", "trainer.num_nodes=3"], r"^trainer\.devices=auto, but torchrun started 2 processes"),
        (["trainer.devices=-1", "trainer.num_nodes=3"], r"^trainer\.devices=-1, .*: type trainer\.devices=2, or .*=1$"),
    ],
)
def test_torchruns_processes_are_those_of_the_trainer(typed, line, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would take itself for the only one, and write what the others write."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name, value in {"TORCHELASTIC_RUN_ID": "7", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "6"}.items():
        monkeypatch.setenv(name, value)
    cfg = compose(["trainer.accelerator=cpu", *typed])
    with pytest.raises(UserError, match=line) if line else nullcontext():
        checks.check(cfg)


@pytest.mark.parametrize(("gpus", "tasks", "line"), [(2, 2, None), (0, 1, None), (0, 2, "1 here"), (4, 2, "4 here")])
def test_all_devices_are_as_many_as_slurm_starts_tasks(gpus, tasks, line, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU each of several would take itself for the only one, and write what the others write."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    job = {"JOB_ID": "7", "JOB_NAME": "train", "STEP_ID": "0", "NNODES": "1", "NTASKS": tasks, "NTASKS_PER_NODE": tasks}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    cfg = compose(["trainer.devices=auto"])
    line = (
        line and rf"^trainer\.devices=auto is {line}, but SLURM starts {tasks} tasks .*type trainer\.devices={tasks},"
    )
    with pytest.raises(UserError, match=line) if line else nullcontext():
        checks.check(cfg)
