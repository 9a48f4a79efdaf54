"""The command as a person meets it: real processes for help, exit codes and the one line, in any directory."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dreambooth import cli, config, flags, nearest

LAUNCH = Path(__file__).resolve().parents[1] / "launch.py"


def launch(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(LAUNCH), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def in_process(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # restored afterwards; main() sets it
    monkeypatch.setattr(sys, "argv", [str(LAUNCH), *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code, capsys.readouterr().err


def work() -> float:
    """Seconds that the processes started here have computed: a busy machine makes them longer on the clock only."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_reads_like_a_page_without_loading_torch(tmp_path):
    begun = work()
    result = launch("--help", cwd=tmp_path)
    assert work() - begun < 3
    assert result.returncode == 0
    assert not result.stderr
    names = {path.stem for path in config.CONF.glob("*/**/*.yaml") if "hydra" not in path.parts}
    assert [name for name in [*names, *config.groups(), *cli.TASKS] if name not in result.stdout] == []
    assert max(map(len, result.stdout.splitlines())) <= 120
    probe = "import sys, dreambooth.cli; sys.exit(bool({'torch', 'diffusers', 'pytorch_lightning'} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(LAUNCH.parent)}
    assert subprocess.run([sys.executable, "-c", probe], env=environment, check=False).returncode == 0


def test_who_reads_only_the_first_lines_is_told_nothing_more(tmp_path):
    command = [sys.executable, str(LAUNCH), "--help"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_short_flag_that_nobody_has_is_one_line(monkeypatch, capsys):
    code, err = in_process(monkeypatch, capsys, "-x")
    assert (code, err.count("\n")) == (2, 1)
    assert "-x: there is no such flag" in err
    assert not any(flags.unknown(flag) for flag in "-h -c -p -m -r -i -cd -cn -cp -1 -0.5".split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trainer.max_step=2"], "did you mean 'trainer.max_steps'?"),
        (["model.data.num_reg_images=-1"], "model.data.num_reg_images=-1: must be at least 0"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2_and_leaves_nothing(arguments, words, tmp_path):
    result = launch(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1, result.stderr
    assert words in result.stderr
    assert not result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_logger_without_its_package_is_one_line_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)  # to Python a package that is not there
    code, said = in_process(monkeypatch, capsys, "logger=wandb", "trainer.max_steps=1")
    assert code == 2
    assert said.count("\n") == 1, said
    assert "the package wandb is not installed; type pip install wandb" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_weights_and_biases_is_told_of_steps_and_samples_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs pip install wandb, which brings too much to be asked of every test run")
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb"))
    words = """logger=wandb logger.wandb.offline=true hydra.run.dir=run trainer.max_steps=2 trainer.log_every_n_steps=1
        model.with_prior_preservation=false callbacks.evaluate=null callbacks.export=null callbacks.report=null
        callbacks.sample_grid.inference_steps=1 callbacks.sample_grid.num_images_per_prompt=1"""
    told = launch(*words.split(), cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    (stored,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert b"train/instance_loss" in stored.read_bytes()
    pictures = stored.parent.glob("files/media/images/samples_*.png")
    assert [picture.read_bytes()[:4] for picture in pictures] == [b"\x89PNG"] * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["task=trian"], "did you mean 'train'?"),
        (["=3"], "dreambooth: "),
        (["--trainer.max_steps=2"], "type trainer.max_steps=2"),
        (["seed=1", "--instance_data_dir", "my photos", "seed=2"], "type 'model.data.instance_dir=my photos';"),
        (["--resolution", "512"], "--resolution: settings have no dashes, type model.data.resolution=512;"),
        (["--train_text_encoder", "--use_8bit_adam"], "type model.train_text_encoder=true;"),
        (["--use_8bit_adam"], "type model/optim=adamw_8bit;"),
        (["--learning-rate=5e-6"], "type model.learning_rate=5e-6;"),
        (["--lr_schedular", "cosine"], "there is no such flag"),
        (["--enable_xformers_memory_efficient_attention"], "there is no such flag"),
        (["-lr=1"], "type model.optim.lr=1;"),
        (["train"], "type task=train"),
        (["-m", "report"], "type task=report"),
        (["trainer=default,gpu"], "quote a text with commas"),
        (["trainer=null"], "null is no card: type GROUP=CARD"),
        (["--config-name", "foo"], "--config-name foo: there is no such file"),
        (["hydra.run.dir=/proc/nowhere/run"], "cannot write the run folder"),
        (["--config-dir", "nowhere"], "nowhere"),
        (["hydra/launcher=slurm", "seed=2"], "type dreambooth -m hydra/launcher=slurm seed=2"),
        (["model=sd15", "model.data.instance_dir=."], "hf download stable-diffusion-v1-5/stable-diffusion-v1-5"),
    ],
)
def test_every_kind_of_mistake_is_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, line = in_process(monkeypatch, capsys, *arguments)
    assert (code, line.count("\n")) == (2, 1), line
    assert words in line
    assert list(tmp_path.iterdir()) == []


def test_the_flags_of_other_trainers_are_answered_with_keys_that_there_are():
    keys = set(dict(nearest.keys(OmegaConf.to_container(config.compose(["model/tuning=pivotal"])))))
    cards = {f"{path.parent.relative_to(config.CONF)}={path.stem}" for path in config.CONF.glob("model/*/*.yaml")}
    missing = {key.partition("=")[0] if key not in cards else "" for key in flags.OURS.values()}
    assert missing - keys == {"", "logger", "hydra.run.dir"} - keys
    assert not flags.unknown("--config-dir=cards")
    assert not any(flags.unknown(f"--{flag}") for flag in ("help", "multirun", "cfg", "info", "resolve"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "model: {optim: {lrr: 1}}",
            "experiment=mine: model.optim.lrr: there is no such key; did you mean 'model.optim.lr'",
        ),
        ("modle: {seed: 1}", "experiment=mine: modle: there is no such key; did you mean 'model'"),
        ("trainer: {max_steps: ten}", "trainer.max_steps=ten: must be a whole number"),
        ("defaults: [override /model/weighting: minsnr]", "did you mean 'min_snr'"),
        ("defaults: [override /model/wieghting: min_snr]", "did you mean 'model/weighting'"),
        ("model: [}", "mine.yaml, line 2"),
        (
            "defaults: [override /callbacks/evaluate: none]\ncallbacks: {evaluate: {patience: 1}}",
            "experiment=mine: callbacks.evaluate is null, so its keys change nothing; pick a card first",
        ),
    ],
)
def test_a_misspelt_experiment_of_the_users_is_found(text, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cards = tmp_path / "cards" / "experiment"
    cards.mkdir(parents=True)
    (cards / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    code, line = in_process(monkeypatch, capsys, "--config-dir", "cards", "experiment=mine")
    assert (code, line.count("\n")) == (2, 1), line
    assert words in line
    assert [path.name for path in tmp_path.iterdir()] == ["cards"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("card", "text", "words"),
    [
        (
            "model",
            "from_pretrained: pocket\nlearning_rat: 1e-3",
            "model=mine: model.learning_rat: there is no such key; did you mean 'model.l",
        ),
        (
            "model",
            "from_pretrained: pocket\nsched: {warmup_step: 5}",
            "model.sched.warmup_step: there is no such key; did you mean",
        ),
        (
            "model",
            "from_pretrained: pocket\nmicro_batch_size: four",
            "model=mine: model.micro_batch_size=four: must be a whole number",
        ),
        ("model", "from_pretrained: pocket\nsched: cosine", "model.sched holds keys; type one of them"),
        ("model", "learning_rate: 1e-3", "model.from_pretrained is not set; type model.from_pretrained=..."),
        ("model", "from_pretrained: pocket\nlearning_rate: ${rate}", "Interpolation key 'rate' not found"),
        ("infer", "promts: a dog", "infer=mine: infer.promts: there is no such key; did you mean 'infer.prompts'"),
        ("infer", "prompts: a dog", "is not set; begin the card with defaults: [a shipped one, _self_]"),
        ("model/tuning", "defaults: [lora, _self_]\nrank: four", "model/tuning=mine: model.tuning.rank=four: must be"),
        ("callbacks/evaluate", "defaults: [default, _self_]\npatience: x", "callbacks.evaluate.patience=x: must be"),
        ("model/data", "defaults: [webdataset, _self_]\nsampler: {steps: 5}", "model.data.sampler.steps: there is no"),
    ],
)
def test_a_misspelt_card_of_the_users_is_found(card, text, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cards" / card
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(f"{text}\n")
    nothing = ["task=report", "report.runs=nowhere"]  # is done, were the card taken
    code, line = in_process(monkeypatch, capsys, "--config-dir", "cards", f"{card}=mine", *nothing)
    assert (code, line.count("\n")) == (2, 1), line
    assert words in line
    assert [path.name for path in tmp_path.iterdir()] == ["cards"]


def test_a_right_card_of_the_users_is_taken(tmp_path, monkeypatch, capsys):
    """What a class takes beyond the shipped card is the class's to know, and nodes of one's own are one's own."""
    monkeypatch.chdir(tmp_path)
    texts = {
        "trainer": "defaults: [default, _self_]\ndeterministic: true",
        "model": "defaults: [override data: pocket_two, override optim: mine, _self_]\nlearning_rate: 1",
        "model/optim": "_target_: torch.optim.AdamW\n_partial_: true\nlr: 0.1\namsgrad: true",
        "model/tuning": "_target_: builtins.dict\nwhat: ever",
        "logger": "csv: {_target_: pytorch_lightning.loggers.CSVLogger, _partial_: true}",
        "callbacks": "defaults: [default, _self_]\nmine: {_target_: builtins.dict}\nsample_grid: null",
        "strategy": "# @package trainer\nstrategy: {_target_: dreambooth.parallel.fsdp.FsdpStrategy, replicate: 1}",
        "metrics": "defaults: [default, _self_]\nencoders: {mine: {_target_: builtins.dict}, dino: null}",
    }
    for group, text in texts.items():
        (folder := tmp_path / "cards" / group).mkdir(parents=True, exist_ok=True)
        (folder / "mine.yaml").write_text(f"{text}\n")
    cards = [f"{group}=mine" for group in texts if group != "model/optim"]
    typed = [
        "model.from_pretrained=pocket",
        "model.learning_rate=1e-5",
        "model.with_prior_preservation=false",
        "infer.model=nowhere",
        "task=generate",
    ]
    code, line = in_process(monkeypatch, capsys, "--config-dir", "cards", *cards, *typed)
    assert (code, line.count("\n")) == (2, 1), line
    assert "No model at 'nowhere'" in line  # the task's own first question: all before it was taken


@pytest.mark.exhaustive
def test_torchrun_finds_one_folder_and_finds_it_again(tiny_sd, photos, tmp_path):
    settings = f"""model.from_pretrained={tiny_sd} model.data.instance_dir={photos} model.data.cached_instance_dir=null
        model.data.resolution=32 model.data.num_reg_images=2 model.data.sampler.inference_steps=2 trainer.max_steps=2
        callbacks.sample_grid=null trainer.accelerator=cpu trainer.devices=2 strategy=ddp evaluate.prompts=[dog]
        evaluate.num_images_per_prompt=1 evaluate.num_class_images=1 callbacks.evaluate.every_n_train_steps=1
        callbacks.evaluate.num_images_per_prompt=1 callbacks.evaluate.num_class_images=1""".split()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(LAUNCH), *settings]
    first, again = (
        subprocess.run(torchrun, cwd=tmp_path, capture_output=True, text=True, check=False) for _ in range(2)
    )
    assert (first.returncode, again.returncode) == (0, 0), first.stderr
    (folder,) = (tmp_path / "outputs" / "dreambooth").iterdir()
    assert first.stdout.splitlines()[-1] == again.stdout.splitlines()[-1] == str(folder)
    assert "is finished" in again.stdout
    assert len((folder / "metrics.csv").read_text().splitlines()) == 3
    assert [row[0] for row in (folder / "curves.csv").read_text().splitlines()] == ["s", "0", "1", "2"]
