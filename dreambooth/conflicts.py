"""What values of several keys may not be together; each complaint is one UserError."""

from collections.abc import Iterable, Mapping
from typing import Any

from dreambooth.errors import UserError
from dreambooth.nearest import nearest
from dreambooth.run_folder import STOPS

TEXT_OR_LIST = ("infer.prompts", "evaluate.prompts", "evaluate.class_prompts", "callbacks.sample_grid.prompts")
LAST_RATE = 1e-7  # of diffusers' polynomial schedule
SUBJECT = ("instance_dir", "instance_prompt", "regularization_prompt", "regularization_dir")  # of model.data.subjects

CURVE = "callbacks.evaluate.every_n_train_steps"


def check(values: Mapping[str, Any]) -> None:
    """Raise UserError at the first values, of the whole tree by dotted key, that exclude each other."""
    pictured = values["model.with_prior_preservation"] and values["model.prior"] == "images"
    if pictured and values["model.data.num_reg_images"] == 0:
        raise UserError(
            "model.data.num_reg_images=0: type at least 1, model.prior=teacher, or model.with_prior_preservation=false"
        )
    for key in ("model.tuning.text_encoder_lr", "model.tuning.stop_text_encoder_at"):
        if values.get(key) is not None and not values["model.train_text_encoder"]:
            raise UserError(f"{key}={values[key]}: the text encoder does not learn; type model.train_text_encoder=true")
    _check_optimizer(values)
    _check_noise_levels(values)
    for key in ("model.train_text_encoder", "model.data.subjects") if "model.tuning.num_vectors" in values else ():
        if values[key]:
            raise UserError(
                f"{key}: one new word learns here, and no other way to read; leave it, or model/tuning=lora"
            )
    _check_prompts(values)
    _check_subjects(values)


def check_typed(overrides: Iterable[str], values: Mapping[str, Any]) -> None:
    """Raise UserError for an override that another value leaves without effect; what cards say is let be."""
    for key in (override.lstrip("+").partition("=")[0] for override in overrides):
        if key in STOPS and values.get(key) is not None and values.get(CURVE, "unset") is None:
            raise UserError(
                f"{key}={values[key]}: with {CURVE}=null there is no curve to stop by; type a number of steps there, "
                f"or leave {key} out"
            )


def _check_optimizer(values: Mapping[str, Any]) -> None:
    """Settings that would undo what an optimizer does by itself."""
    target, rate = str(values.get("model.optim._target_")).lower(), values.get("model.optim.lr")
    if "schedulefree" in target and values.get("model.ema.decay") is not None:
        raise UserError("model.ema.decay: a Schedule-Free optimizer averages by itself; type model.ema.decay=null")
    if target.endswith(".prodigy"):
        if rate is not None and rate < 0.1:
            raise UserError(f"model.optim.lr={rate}: Prodigy finds its rate by itself; type model.optim.lr=1")
        for key in ("model.tuning.text_encoder_lr", "model.tuning.embedding_lr"):
            if values.get(key) is not None:
                raise UserError(f"{key}: Prodigy finds one rate for all; type {key}=null, or another optimizer")
    if values["model.sched.name"] == "polynomial" and rate is not None and rate <= LAST_RATE:
        raise UserError(
            f"model.learning_rate={rate}: model.sched.name=polynomial falls to {LAST_RATE}; type a higher one"
        )
    if values.get("model.optim.relative_step"):
        raise UserError(
            "model.optim.relative_step=true: a rate that Adafactor finds cannot follow model.sched; type false and "
            "model.learning_rate, or model/optim=prodigy"
        )


def _check_noise_levels(values: Mapping[str, Any]) -> None:
    """What could not draw from noise levels that end in pure noise."""
    if not values.get("model.objective.rescale_zero_terminal_snr"):
        return
    for key in ("callbacks.sample_grid.sampler_type", "evaluate.sampler_type"):
        if values.get(key) == "PLMS":
            raise UserError(f"{key}=PLMS cannot draw from noise levels of zero terminal SNR: type DDIM, DPM or EULER")


def _check_prompts(values: Mapping[str, Any]) -> None:
    # The class prompt before those that are made of it, and whether or not there is a prior: drift is measured by it.
    for key in ("model.data.instance_prompt", "model.data.regularization_prompt", *TEXT_OR_LIST):
        prompts = values.get(key, "unset")
        listed = prompts if isinstance(prompts, list) else [prompts]
        if not listed or not all(str(prompt).strip() for prompt in listed):
            raise UserError(f"{key} is empty; type what the picture shows, such as {key}='a photo of a sks dog'")


def _check_subjects(values: Mapping[str, Any]) -> None:
    """Each one a mapping of the keys of ``SUBJECT``, none of them empty, and no instance prompt that another has."""
    if values["model.data.subjects"] == []:
        raise UserError("model.data.subjects is empty; list them as the card model/data=pocket_two does")
    prompts: list[str] = []
    for number, entry in enumerate(values["model.data.subjects"] or ()):
        place = f"model.data.subjects[{number}]"
        if not isinstance(entry, Mapping):
            raise UserError(f"{place}={entry}: must hold the keys {', '.join(SUBJECT)}")
        for key in entry:
            if key not in SUBJECT:
                raise UserError(f"{place}.{key}: there is no such key{nearest(str(key), SUBJECT)}")
        needed = SUBJECT[: 3 if values["model.with_prior_preservation"] else 2]
        for key in needed:
            if not str(entry.get(key) or "").strip():
                raise UserError(f"{place}.{key} is not set; each subject names {', '.join(needed)}")
        if entry["instance_prompt"] in prompts:
            raise UserError(
                f"{place}.instance_prompt='{entry['instance_prompt']}' is another's; type another rare word"
            )
        prompts.append(entry["instance_prompt"])
