"""Every card composes, binds to what it configures, and no experiment adds a key; wrong input gets one line."""

import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

from dreambooth import config, values
from dreambooth.errors import UserError
from dreambooth.task_table import TASKS

CARDS = sorted(
    (str(path.parent.relative_to(config.CONF)), path.stem)
    for path in config.CONF.glob("*/**/*.yaml")
    if "hydra" not in path.parts
)
EXPERIMENTS = [card for group, card in CARDS if group == "experiment"]
PHOTOS = "model.data.instance_dir=photos"
SUBJECT = "{instance_dir: photos, instance_prompt: a photo of a sks dog, regularization_prompt: a photo of a dog}"
NEEDED = {"subjects": [f"model.data.subjects=[{SUBJECT}]"]}


def composed(*overrides: str) -> dict:
    return OmegaConf.to_container(config.compose(list(overrides)), resolve=True)


def targets(node, path=""):
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from targets(value, f"{path}.{key}".lstrip("."))


def unbound(node: dict, given: int = 0) -> str:
    """Why the arguments of a node do not fit the signature of its target, empty when they do."""
    arguments = {key: value for key, value in node.items() if not key.startswith("_")}
    signature = inspect.signature(get_object(node["_target_"]))
    try:
        (signature.bind_partial if node.get("_partial_") else signature.bind)(**arguments)
    except TypeError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize(("group", "card"), CARDS, ids=["=".join(card) for card in CARDS])
def test_every_card_composes_and_binds(group, card):
    cfg = composed(f"{group}={card}", *NEEDED.get(card, [PHOTOS]))
    problems = {path: unbound(node) for path, node in targets(cfg)}
    assert not {path: problem for path, problem in problems.items() if problem}


def test_the_default_is_the_demo_and_all_groups_are_in_the_table_of_contents():
    cfg = config.compose()
    assert cfg.model.from_pretrained == "pocket"
    assert cfg.model.data.instance_dir.endswith("pocket/subjects/dog")
    assert {group for group, _ in CARDS} == set(config.groups())


@pytest.mark.slow
def test_the_run_folder_is_known_without_a_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for variable in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(variable, raising=False)
    one, same, other = (config.compose(overrides) for overrides in (["seed=1"], ["infer.seed=7", "seed=1"], ["seed=2"]))
    assert one.run_dir == same.run_dir != other.run_dir
    assert Path(one.run_dir).parent == tmp_path / "outputs" / "dreambooth"
    assert one.infer.model == one.run_dir
    assert config.compose(["hydra.run.dir=here"]).run_dir == str(tmp_path / "here")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    assert Path(config.compose().run_dir).name == "mine"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "23237cc1-da53-4e92-9596-568d21e93690")
    assert config.compose(["seed=1"]).run_dir == one.run_dir
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert Path(config.compose().run_dir).name == "12"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.max_step=3", ["trainer.max_step", "did you mean 'trainer.max_steps'"]),
        ("traner.max_steps=3", ["did you mean 'trainer.max_steps'"]),
        ("max_steps=3", ["did you mean 'trainer.max_steps'"]),
        ("model.data.instance_dri=x", ["did you mean 'model.data.instance_dir'"]),
        ("prior_loss_weight=0", ["did you mean 'model.prior_loss_weight'"]),
        ("model=sd16", ["model=sd16", "did you mean 'sd1"]),
        ("modle=sd15", ["did you mean 'model'"]),
        ("model/optin=adamw", ["no such group", "did you mean 'model/optim'"]),
        ("model/weighting=minsnr", ["did you mean 'min_snr'"]),
        ("model.weighting=min_snr", ["model/weighting=min_snr"]),
        ("model.data=folder", ["model.data holds keys; a card is picked with model/data=folder"]),
        ("model.ema=0.99", ["model.ema holds keys; type one of them, such as model.ema.decay=..."]),
        ("model.data.sampler=DDIM", ["model.data.sampler holds keys", "such as model.data.sampler."]),
        ("model.sched=cosine", ["model.sched.name=..."]),
        ("hydra.run.dir=", ["hydra.run.dir is empty"]),
        ("hydra.run.dirr=x", ["hydra.run.dirr: there is no such key", "hydra.run.dir"]),
        ("experiment=nemo_sd51", ["did you mean 'nemo_sd15'"]),
        ("~model.prior", ["~model.prior: it cannot be left out", "model.prior=images"]),
        ("~trainer.devices", ["~trainer.devices: it cannot be left out"]),
        ("model.optim.relative_step=true", ["model.optim.relative_step"]),
        ("model.tuning.dropout=1.5", ["model.tuning.dropout"]),
        ("~trainer.max_step", ["did you mean 'trainer.max_steps'"]),
        ("train", ["cannot read 'train'", "key=value"]),
        ("model.data.instance_prompt=a, b", ["model.data.instance_prompt"]),
        ("model.data.instance_dir=${nowhere.at_all}", ["nowhere.at_all"]),
        ("trainer.max_steps=abc", ["trainer.max_steps=abc", "whole number"]),
        ("trainer.max_steps=1.5", ["whole number"]),
        ("trainer.max_steps=0", ["at least 1"]),
        ("trainer.precision=16", ["did you mean '16-mixed'"]),
        ("model.data.resolution=foo", ["model.data.resolution=foo", "whole number"]),
        ("model.data.num_reg_images=-1", ["model.data.num_reg_images=-1", "at least 0"]),
        ("model.data.num_reg_images=0", ["at least 1, model.prior=teacher, or model.with_prior_preservation=false"]),
        ("model.data.num_reg_images=null", ["model.data.num_reg_images=None", "whole number"]),
        ("model.prior=teachers", ["did you mean 'teacher'"]),
        ("model.tuning.stop_text_encoder_at=5", ["model.train_text_encoder=true"]),
        ("model.tuning.rank=4", ["model.tuning.rank", "model/tuning=lora or pivotal has it"]),
        ("model.micro_batch_size=0", ["at least 1"]),
        ("model.prior_loss_weight=-0.1", ["at least 0"]),
        ("model.train_text_encoder=maybe", ["true or false"]),
        ("model.ema.decay=1", ["between 0 and 1"]),
        ("model.optim.betas=0.9", ["a list"]),
        ("model.optim.betas=[0.9,1.1]", ["two below 1"]),
        ("model.data.instance_prompt=''", ["model.data.instance_prompt is empty"]),
        ("infer.prompts=[]", ["infer.prompts is empty"]),
        ("infer.sampler_type=DDMI", ["did you mean 'DDIM'"]),
        ("model.data.sampler.sampler_type=DDMI", ["model.data.sampler.sampler_type", "did you mean 'DDIM'"]),
        ("model.data.sampler.inference_steps=1000", ["model.data.sampler.inference_steps", "1 to 999"]),
        ("infer.unconditional_guidance_scale=-1", ["at least 0"]),
        ("evaluate.guidance_rescale=1.5", ["evaluate.guidance_rescale=1.5", "from 0 to 1"]),
        ("callbacks.checkpoint.every_n_train_steps=0", ["at least 1"]),
        ("callbacks.checkpoint.save_last_k=0", ["-1 to keep all"]),
        ("callbacks.nan_guard.patience=0", ["at least 1"]),
        ("model.sched.name=cosin", ["did you mean 'cosine'"]),
        ("run_dir=x", ["hydra.run.dir"]),
        ("model.optim.betas=[a,1]", ["model.optim.betas", "two below 1"]),
        ("model.data.instance_dir=", ["model.data.instance_dir is empty"]),
        ("name=", ["name is empty"]),
        ("model.data.regularization_prompt=", ["model.data.regularization_prompt is empty"]),
        ("model.sched.num_cycles=0", ["at least 1"]),
        ("model.sched.power=0", ["above 0"]),
        ("pretrain.steps.eye=-1", ["pretrain.steps.eye=-1", "at least 0"]),
        ("trainer.devices=0", ["trainer.devices=0: must be a number of devices"]),
        ("trainer.devices=null", ["trainer.devices=None: must be a number of devices"]),
        ("trainer.devices=1.5", ["trainer.devices=1.5: must be a number of devices"]),
        ("trainer.devices=true", ["trainer.devices=True: must be a number of devices"]),
        ("model.data.instance_dir=2024_06", ["model.data.instance_dir='\"202406\"'", "read as a number; quote"]),
        ("infer.out_path=1", ["infer.out_path='\"1\"'"]),
        ("model.data.regularization_dir=1", ["model.data.regularization_dir='\"1\"'"]),
        ("evaluate.images=1", ["evaluate.images='\"1\"'"]),
        ("model.from_pretrained=1e3", ["model.from_pretrained='\"1000.0\"'"]),
        ("+model.foo=1", ["+model.foo: there is no such key"]),
        ("+infer.stepps=1", ["+infer.stepps: there is no such key", "there are"]),
        ("+max_steps=1", ["+max_steps", "did you mean 'trainer.max_steps'"]),
        ("++model.sched.warmup=1", ["did you mean 'model.sched.warmup_steps'"]),
        ("model=sd15", ["model.data.instance_dir is not set"]),
    ],
)
def test_wrong_input_is_one_line_with_the_right_name(override, words):
    with pytest.raises(UserError) as caught:
        config.compose([override])
    line = str(caught.value)
    assert "\n" not in line
    assert all(word in line for word in words), line


def test_a_number_that_is_quoted_in_a_shell_is_a_name():
    """As the line says that refuses it, which a shell has taken apart before."""
    (typed,) = shlex.split("""model.data.instance_dir='"2024_06"'""")
    assert config.compose([typed]).model.data.instance_dir == "2024_06"


def test_a_key_of_a_card_that_is_not_in_use_is_told_its_card():
    with pytest.raises(UserError, match=r"patience: there is no such key; callbacks/evaluate=default has it$"):
        config.compose(["model=sd15", "callbacks.evaluate.patience=4"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if not re.match("nemo|mindone_sd|diffusers", name)])
def test_an_experiment_of_the_pocket_model_runs_with_another(name):
    """The callbacks that its keys are of are there: with other models than the pocket's they are off."""
    cfg = config.compose([f"experiment={name}", "model=sd15", "model.data.instance_dir=."])
    assert all("_target_" in node for node in cfg.callbacks.values() if node is not None)


def test_a_schedule_that_falls_to_more_than_the_rate_is_refused():
    with pytest.raises(UserError, match=r"model\.learning_rate=1e-07: model\.sched\.name=polynomial falls to 1e-07"):
        config.compose(["model.sched.name=polynomial", "model.learning_rate=1e-7"])


@pytest.mark.parametrize("value", ["0", "-1", "1.5"])
def test_groups_of_ranks_are_at_least_one(value):
    with pytest.raises(UserError, match=r"trainer\.strategy\.replicate=.*: must be"):
        config.compose(["strategy=fsdp", f"trainer.strategy.replicate={value}"])
    assert config.compose(["strategy=fsdp", "trainer.strategy.replicate=null"]).trainer.strategy.replicate is None


def test_right_input_of_several_kinds_is_taken():
    given = """+trainer.deterministic=true trainer.devices=auto trainer.gradient_clip_val=null callbacks.export=null
    infer.prompts=dog model.ema.decay=0.99 model.optim.lr=1 model.data.instance_prompt='a,b' name=7"""
    given += " evaluate.unconditional_guidance_scale=3.5 model.data.sampler.unconditional_guidance_scale=2.5"
    given += " model.data.caption_template=5 ++seed=3 +model.optim.amsgrad=true"
    given += " +callbacks.mine={_target_:builtins.dict,_partial_:true} model.data.instance_dir=photos"
    cfg = config.compose(given.split())
    assert (cfg.seed, cfg.model.optim.amsgrad) == (3, True)
    assert (cfg.trainer.deterministic, cfg.callbacks.export, cfg.infer.prompts) == (True, None, "dog")


@pytest.mark.parametrize(
    ("override", "words"),
    [("trainer.strategy=dpp", "dpp"), ("+trainer.foo=1", "foo"), ("trainer.devices=none", "devices")],
)
def test_what_lightning_refuses_is_one_line_too(override, words):
    with pytest.raises(UserError, match="trainer: .*" + words):
        config.build(config.compose([override, "trainer.accelerator=cpu"]).trainer)


def test_a_long_text_is_the_name_of_a_folder_too():
    assert config.slug("a photo, of a dog.") == "a-photo-of-a-dog"
    assert config.slug("x" * 100) == "x" * 100
    prompts = ["a photo of a dog " + word * 60 for word in ("ein Hund ", "ein Huhn ", "狗")]
    names = [config.slug(prompt) for prompt in prompts]
    assert all(92 <= len(name.encode()) <= 100 and name.startswith("a-photo-of-a-dog-") for name in names)
    assert config.slug(prompts[0]) == names[0]
    assert config.slug(prompts[0][:-1] + "!") != names[0]
    cfg = config.compose([f"model.data.regularization_prompt='{prompts[0]}'", f"model.data.instance_dir={'d/' * 130}"])
    folders = [cfg.model.data.regularization_dir, cfg.model.data.cached_instance_dir]
    assert max(len(part) for folder in folders for part in Path(folder).parts) <= 100


def test_the_samplers_of_the_tree_are_those_that_draw():
    assert set(values.SAMPLERS) == set(get_object("dreambooth.sampling.SAMPLERS"))


def test_every_task_exists():
    for task in TASKS.values():
        assert callable(get_object(task.function.replace(":", ".")))


@pytest.mark.exhaustive
def test_the_names_of_the_package_are_functions_in_any_order_of_import():
    code = "import dreambooth.generation, dreambooth.tasks; from dreambooth import compose, generate, train; compose()"
    code += "; assert callable(generate) and callable(train) and callable(compose)"
    assert subprocess.run([sys.executable, "-c", code], cwd=config.CONF.parent, check=False).returncode == 0
