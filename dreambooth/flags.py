"""``--flags``, as argparse scripts have them, answered with the key that is meant. Needs no torch."""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from dreambooth.errors import UserError
from dreambooth.nearest import keys, nearest

HYDRAS = set(
    """help hydra-help version cfg resolve package run multirun shell-completion config-path config-name config-dir
    experimental-rerun info""".split()
)
SHORT = set("h c p r m cp cn cd sc i".split())
# What diffusers' (first) and MindONE's scripts call our keys, where the last part of the key is another word, or that
# of several keys. The README has the whole table.
OURS = dict(
    pair.split(":")
    for pair in """pretrained_model_name_or_path:model.from_pretrained pretrained_model_path:model.from_pretrained
    instance_data_dir:model.data.instance_dir class_data_dir:model.data.regularization_dir
    class_prompt:model.data.regularization_prompt num_class_images:model.data.num_reg_images
    sample_batch_size:model.data.num_images_per_prompt resolution:model.data.resolution
    image_size:model.data.resolution random_crop:model.data.center_crop=false
    dataloader_num_workers:model.data.num_workers use_lora:model/tuning=lora rank:model.tuning.rank
    lora_rank:model.tuning.rank lora_alpha:model.tuning.alpha lora_dropout:model.tuning.dropout
    placeholder_token:model/tuning=textual_inversion train_text_encoder_ti:model/tuning=pivotal
    train_batch_size:model.micro_batch_size gradient_accumulation_steps:trainer.accumulate_grad_batches
    max_grad_norm:trainer.gradient_clip_val clip_grad:trainer.gradient_clip_val max_train_steps:trainer.max_steps
    num_train_epochs:trainer.max_epochs epochs:trainer.max_epochs mixed_precision:trainer.precision
    start_learning_rate:model.learning_rate use_8bit_adam:model/optim=adamw_8bit adam_beta1:model.optim.betas
    adam_beta2:model.optim.betas adam_weight_decay:model.optim.weight_decay adam_epsilon:model.optim.eps
    lr_scheduler:model.sched.name lr_warmup_steps:model.sched.warmup_steps use_ema:model.ema.decay
    offset_noise:model.noise_offset snr_gamma:model/weighting=min_snr
    checkpointing_steps:callbacks.checkpoint.every_n_train_steps report_to:logger
    ckpt_save_interval:callbacks.checkpoint.every_n_train_steps
    checkpoints_total_limit:callbacks.checkpoint.save_last_k output_dir:hydra.run.dir output_path:hydra.run.dir
    validation_prompt:callbacks.sample_grid.prompts validation_steps:callbacks.sample_grid.every_n_train_steps
    num_validation_images:callbacks.sample_grid.num_images_per_prompt""".split()
)


def unknown(argument: str) -> bool:
    """Whether an argument is a flag that Hydra does not have."""
    name = argument.lstrip("-").partition("=")[0]
    long = re.match(r"--[A-Za-z_]", argument) and name not in HYDRAS
    short = re.fullmatch(r"-[A-Za-z]\w*", argument) and name not in SHORT
    return bool(long or short or re.match(r"-[a-z]\w*[=./]", argument))


def refusal(arguments: Sequence[str], place: int, tree: Mapping[str, Any]) -> UserError:
    """What to type for the flag at a place of the command; ``tree`` is the one that has our keys."""
    flag, _, value = arguments[place].partition("=")
    name = flag.lstrip("-")
    following = [*arguments[place + 1 : place + 2], ""][0]
    if not value and not following.startswith("-") and "=" not in following:
        value = following
    known = {key: leaf for key, leaf in keys(tree) if not isinstance(leaf, Mapping)}
    same = name.replace("-", "_")
    key = OURS.get(same) or next((key for key in known if same in (key, key.rpartition(".")[2])), None)
    if "." in name:
        key = name
    if key is None:
        near = nearest(same, {key.rpartition(".")[2] for key in known}) if same else ""
        near = near if "did you mean" in near else ""
        return UserError(
            f"{flag}: there is no such flag, and settings have no dashes, as in trainer.max_steps=400{near}"
        )
    asked = key if "=" in key else f"{key}={value or ('true' if isinstance(known.get(key), bool) else '...')}"
    asked = shlex.quote(asked) if " " in asked else asked
    return UserError(f"{flag}: settings have no dashes, type {asked}; --help names the usual ones")
