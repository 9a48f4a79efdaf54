"""The published recipes, each value as its source has it: a change of a default of ours must not change them.

And the experiments: what each of them sweeps, as docs/experiments.md says.
"""

from functools import reduce
from itertools import product
from operator import getitem

import hydra
import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import OmegaConf

from dreambooth.config import CONF, compose, register_resolvers

# NVIDIA NeMo v2.4.0, examples/multimodal/text_to_image/dreambooth/conf/dreambooth.yaml and dreambooth_infer.yaml
NEMO = {
    "trainer.max_steps": 400,
    "trainer.precision": "bf16-mixed",
    "trainer.gradient_clip_val": 1.0,
    "trainer.accumulate_grad_batches": 1,
    "seed": 1234,
    "model.micro_batch_size": 2,
    "model.with_prior_preservation": False,
    "model.prior_loss_weight": 0.5,
    "model.train_text_encoder": False,
    "model.use_cached_latents": False,
    "model.ema.decay": None,
    "model.optim._target_": "torch.optim.AdamW",
    "model.optim.lr": 1e-6,
    "model.optim.weight_decay": 0.0,
    "model.optim.betas": [0.9, 0.999],
    "model.optim.eps": 1e-8,
    "trainer.log_every_n_steps": 10,
    "model.sched.name": "constant_with_warmup",
    "model.sched.warmup_steps": 1,
    "model.data.num_workers": 4,
    "model.data.instance_prompt": "a photo of a sks dog",
    "model.data.regularization_prompt": "a photo of a dog",
    "model.data.num_reg_images": 10,
    "model.data.num_images_per_prompt": 4,
    "model.data.resolution": 512,
    "model.data.center_crop": True,
    "model.data.random_flip": False,
    "model.data.sampler.inference_steps": 50,
    "model.data.sampler.unconditional_guidance_scale": 7.5,
    "model.data.sampler.sampler_type": "PLMS",
    "callbacks.checkpoint.every_n_train_steps": 200,
    "callbacks.checkpoint.save_last_k": -1,
    "infer.num_images_per_prompt": 4,
    "infer.inference_steps": 100,
    "infer.unconditional_guidance_scale": 7.5,
    "infer.sampler_type": "DDIM",
    "infer.seed": 123,
}
# MindONE, examples/stable_diffusion_v2/configs/train/train_config_dreambooth_v2.yaml over train_dreambooth.py's flags
MINDONE = {
    "trainer.max_epochs": 4,
    "trainer.max_steps": None,
    "trainer.precision": "16-mixed",
    "trainer.gradient_clip_val": None,
    "trainer.accumulate_grad_batches": 1,
    "seed": 3407,
    "model.micro_batch_size": 1,
    "model.with_prior_preservation": True,
    "model.prior_loss_weight": 1.0,
    "model.train_text_encoder": True,
    "model.gradient_checkpointing": True,
    "model.ema.decay": None,
    "model.optim._target_": "torch.optim.AdamW",
    "model.optim.lr": 2e-6,
    "model.optim.weight_decay": 0.01,
    "model.optim.betas": [0.9, 0.98],
    "model.optim.eps": 1e-6,
    "model.sched.name": "constant",
    "model.data.num_reg_images": 200,
    "model.data.num_images_per_prompt": 4,
    "model.data.resolution": 512,
    "model.data.center_crop": False,
    "model.data.random_flip": True,
    "model.data.train_data_repeats": 40,
    "model.data.sampler.inference_steps": 50,
    "model.data.sampler.unconditional_guidance_scale": 9.0,
    "model.data.sampler.sampler_type": "DDIM",
    "callbacks.checkpoint.every_n_train_steps": 200,
    "callbacks.checkpoint.save_last_k": 10,
}
# diffusers, examples/dreambooth/train_dreambooth.py: the defaults of its flags, and max_train_steps of its README
DIFFUSERS = {
    "trainer.precision": "32-true",
    "trainer.max_steps": 400,
    "trainer.gradient_clip_val": 1.0,
    "trainer.accumulate_grad_batches": 1,
    "model.micro_batch_size": 4,
    "model.with_prior_preservation": False,
    "model.prior_loss_weight": 1.0,
    "model.train_text_encoder": False,
    "model.use_cached_latents": False,
    "model.noise_offset": 0.0,
    "model.optim._target_": "torch.optim.AdamW",
    "model.optim.lr": 5e-6,
    "model.optim.weight_decay": 0.01,
    "model.optim.betas": [0.9, 0.999],
    "model.optim.eps": 1e-8,
    "model.sched.name": "constant",
    "model.sched.warmup_steps": 500,
    "model.sched.num_cycles": 1,
    "model.sched.power": 1.0,
    "model.data.num_workers": 0,
    "model.data.sampler.inference_steps": 50,
    "model.data.sampler.unconditional_guidance_scale": 7.5,
    "model.data.sampler.sampler_type": "PLMS",
    "model.data.num_reg_images": 100,
    "model.data.num_images_per_prompt": 4,
    "model.data.resolution": 512,
    "model.data.center_crop": False,
    "model.data.random_flip": False,
    "callbacks.checkpoint.every_n_train_steps": 500,
    "callbacks.sample_grid.every_n_train_steps": 100,
    "callbacks.sample_grid.num_images_per_prompt": 4,
    "callbacks.sample_grid.inference_steps": 25,
    "callbacks.sample_grid.sampler_type": "DPM",
}
RECIPES = {
    "nemo_sd15": NEMO,
    "nemo_sd15_lora": NEMO
    | {
        "trainer.max_steps": 500,
        "model.micro_batch_size": 1,
        "model.optim.lr": 1e-4,
        "model.tuning._target_": "dreambooth.tuning.lora.Lora",
        "model.tuning.rank": 32,
        "model.tuning.alpha": 16,
        "model.tuning.dropout": 0.0,
        "infer.inference_steps": 50,
    },
    "mindone_sd20": MINDONE,
    "mindone_sd20_vanilla": MINDONE | {"model.with_prior_preservation": False},
    "mindone_sd20_unet_only": MINDONE | {"trainer.max_epochs": 20, "model.train_text_encoder": False},
    "mindone_sd20_lora": MINDONE
    | {
        "model.optim.lr": 5e-5,
        "model.optim.weight_decay": 1e-4,
        "model.tuning._target_": "dreambooth.tuning.lora.Lora",
        "model.tuning.rank": 64,
        "model.tuning.alpha": 64,  # its adapters count once
    },
    "diffusers_sd14": DIFFUSERS,
}
CASES = [(name, key, value) for name, recipe in RECIPES.items() for key, value in recipe.items()]
TREES: dict[str, dict] = {}


@pytest.mark.parametrize(("name", "key", "value"), CASES, ids=[f"{name}-{key}" for name, key, _ in CASES])
def test_a_recipe_is_its_source(name, key, value):
    if name not in TREES:
        tree = compose([f"experiment={name}", "model.data.instance_dir=photos"])
        TREES[name] = OmegaConf.to_container(tree, resolve=True)
    assert reduce(getitem, key.split("."), TREES[name]) == value


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_learns_at_the_rate_that_is_typed(name):
    tree = compose([f"experiment={name}", "model.data.instance_dir=photos", "model.learning_rate=3e-5"])
    assert tree.model.optim.lr == 3e-5


SEEDS, PRIOR = {"seed": [1234, 1, 2]}, {"model.with_prior_preservation": [True, False]}
SWEPT = {  # steps, and the settings; differences are from the first one
    "table3": (400, PRIOR | SEEDS),
    "table4": (400, {"benchmark.noun": [None, "", "boot"]} | SEEDS),
    "table5": (400, {"benchmark.num_photos": [1, 2, 3, 4, 5]}),
    "text_encoder": (400, {"model.train_text_encoder": [False, True]}),
    "prior_weight": (400, {"model.prior_loss_weight": [1.0, 0.1]}),
    "overfitting": (400, PRIOR),
    "mindone_figures": (1000, PRIOR),
}


@pytest.mark.parametrize("name", SWEPT)
def test_an_experiment_sweeps_what_its_page_says(name):
    steps, settings = SWEPT[name]
    register_resolvers()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = hydra.compose("config", [f"experiment={name}"], return_hydra_config=True)
    assert cfg.hydra.mode is RunMode.MULTIRUN  # by itself, without -m
    parser, typed = OverridesParser.create(), [f"{key}={values}" for key, values in cfg.hydra.sweeper.params.items()]
    (jobs,) = BasicSweeper.split_arguments(parser.parse_overrides(typed), None)
    found = [{one.key_or_group: one.value() for one in parser.parse_overrides(list(job))} for job in jobs]
    assert found == [dict(zip(settings, values, strict=True)) for values in product(*settings.values())]
    assert (cfg.name, cfg.trainer.max_steps) == (name, steps)
    if name == "mindone_figures":
        assert (cfg.task, len(cfg.evaluate.prompts), len(cfg.evaluate.class_prompts)) == ("train", 3, 3)
    else:
        assert (cfg.task, list(cfg.benchmark.subjects)) == ("benchmark", ["dog", "cat2", "teapot"])
