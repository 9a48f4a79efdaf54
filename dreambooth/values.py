"""What the value of each key may be: which may be null, of how many words they choose, in which ranges they lie."""

import re
from collections.abc import Callable
from typing import Any

ONE_OR_MANY = ("report.runs", "shard.folders", "model.data.instance_shards", "model.data.regularization_shards")
ANYTHING = ("trainer.devices", "trainer.strategy", "trainer.logger")  # Lightning takes several kinds
NULLABLE: dict[str, type] = {  # null beside a value of this kind
    "trainer.max_steps": int,
    "trainer.max_epochs": int,
    "trainer.gradient_clip_val": float,
    "trainer.strategy.replicate": int,
    "model.revision": str,
    "model.variant": str,
    "model.restore_from_path": str,
    "model.ema.decay": float,
    "model.objective.shift": float,
    "model.tuning.text_encoder_lr": float,
    "model.tuning.stop_text_encoder_at": int,
    "model.tuning.placeholder_token": str,
    "model.tuning.initializer_token": str,
    "model.tuning.embedding_lr": float,
    "model.tuning.embedding_steps": float,
    "callbacks.sample_grid.every_n_train_steps": int,
    "model.data.cached_instance_dir": str,
    "model.data.cached_reg_dir": str,
    "model.data.captions": str,
    "model.data.masks": str,
    "model.data.subjects": list,
    "callbacks.evaluate.every_n_train_steps": int,
    "callbacks.evaluate.patience": int,
    "callbacks.evaluate.max_drift": float,
    "callbacks.evaluate.max_forgetting": float,
    "callbacks.evaluate.target": float,
    "metrics.encoders.dino.checkpoint_path": str,
    "metrics.encoders.lpips.backbone_path": str,
    "evaluate.negative_prompt": str,
    "evaluate.photos": str,
    "evaluate.images": str,
    "evaluate.out_path": str,
    "evaluate.base_dir": str,
    "evaluate.batch_size": int,
    "infer.batch_size": int,
    "benchmark.subjects": list,
    "benchmark.base_dir": str,
    "benchmark.runs_dir": str,
    "benchmark.noun": str,
    "benchmark.num_photos": int,
    "benchmark.num_prompts": int,
    "identifier.out_path": str,
    "infer.negative_prompt": str,
    "infer.adapter": str,
    "infer.out_path": str,
    "report.out_path": str,
    "model.data.instance_shards": str,
    "model.data.regularization_shards": str,
    "shard.folders": str,
    "shard.out_path": str,
}
SAMPLERS = ("DDIM", "PLMS", "DPM", "EULER")
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}
CHOICES = {
    "trainer.precision": ("32-true", "bf16-mixed", "16-mixed"),
    "trainer.accelerator": ("auto", "cpu", "gpu", "cuda", "mps"),
    "model.sched.name": (
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial",
    ),
    "model.data.sampler.sampler_type": SAMPLERS,
    "callbacks.sample_grid.sampler_type": SAMPLERS,
    "evaluate.sampler_type": SAMPLERS,
    "infer.sampler_type": SAMPLERS,
    "model.prior": ("images", "teacher"),
    "model.data.masks": ("alpha", "files"),
    "metrics.text": ("class", "identifier"),
    "metrics.average": ("pictures", "prompts"),
    "model.objective.timesteps": ("uniform", "logit_normal"),
}  # fmt: skip
RANGES: list[tuple[str, Callable[[Any], bool], str]] = [  # what must be, of which keys
    (
        "at least 0",
        lambda value: value >= 0,
        """seed identifier.seed infer.seed evaluate.seed callbacks.evaluate.seed callbacks.evaluate.drift_weight
        pretrain.seed pretrain.steps.judge pretrain.steps.autoencoder pretrain.steps.decoder pretrain.steps.imagetext
        pretrain.steps.individuals pretrain.steps.eye pretrain.steps.denoiser pretrain.steps.individual
        callbacks.sample_grid.seed model.prior_loss_weight model.noise_offset
        model.sched.warmup_steps model.weighting.x0 model.optim.weight_decay model.data.num_reg_images
        model.data.num_workers model.data.sampler.unconditional_guidance_scale
        callbacks.sample_grid.unconditional_guidance_scale infer.unconditional_guidance_scale
        evaluate.unconditional_guidance_scale""",
    ),
    (
        "at least 1",
        lambda value: value >= 1,
        """trainer.num_nodes trainer.accumulate_grad_batches trainer.log_every_n_steps model.micro_batch_size
        model.data.num_images_per_prompt model.data.resolution model.data.cached_variants model.data.train_data_repeats
        model.data.shuffle shard.pictures_per_shard model.sched.num_cycles
        pretrain.scenes pretrain.held_out pretrain.every_nth_prompt
        callbacks.nan_guard.patience callbacks.checkpoint.every_n_train_steps callbacks.sample_grid.every_n_train_steps
        callbacks.sample_grid.num_images_per_prompt callbacks.sample_grid.resolution infer.num_images_per_prompt
        evaluate.batch_size infer.batch_size trainer.strategy.replicate
        evaluate.num_images_per_prompt evaluate.num_class_images callbacks.evaluate.every_n_train_steps
        benchmark.num_prompts benchmark.num_photos model.data.bucket_ratio
        benchmark.num_images_per_prompt benchmark.num_class_images identifier.candidates identifier.max_characters
        identifier.num_images callbacks.evaluate.num_images_per_prompt
        callbacks.evaluate.num_class_images callbacks.evaluate.patience model.tuning.rank
        model.tuning.stop_text_encoder_at model.tuning.num_vectors""",
    ),
    ("at least 1, or -1 for no end", lambda value: value >= 1 or value == -1, "trainer.max_steps trainer.max_epochs"),
    ("at least 1, or -1 to keep all", lambda value: value >= 1 or value == -1, "callbacks.checkpoint.save_last_k"),
    (
        "1 to 999",  # of 1,000 noise levels, the last one of which steps_offset would pass
        lambda value: 1 <= value <= 999,
        "model.data.sampler.inference_steps callbacks.sample_grid.inference_steps infer.inference_steps "
        "evaluate.inference_steps",
    ),
    (
        "above 0",
        lambda value: value > 0,
        "callbacks.evaluate.max_drift callbacks.evaluate.max_forgetting callbacks.evaluate.target "
        "trainer.gradient_clip_val model.weighting.gamma model.loss.delta model.objective.std model.objective.shift "
        "model.learning_rate model.optim.lr model.optim.eps model.optim.d_coef "
        "model.tuning.text_encoder_lr model.tuning.alpha model.tuning.embedding_lr model.tuning.embedding_steps "
        "infer.adapter_scale model.sched.power",
    ),
    (
        "from 0 to 1",
        lambda value: 0 <= value <= 1,
        "model.data.sampler.guidance_rescale callbacks.sample_grid.guidance_rescale infer.guidance_rescale "
        "evaluate.guidance_rescale",
    ),
    (
        "at least 0 and below 1",
        lambda value: 0 <= value < 1,
        "model.data.caption_dropout model.data.mask_floor model.tuning.dropout",
    ),
    (
        "made of words, {caption}, {prompt} and {name}",
        lambda value: (
            str(value).strip() != "" and not re.search(r"[{}]", re.sub(r"\{(caption|prompt|name)\}", "", str(value)))
        ),
        "model.data.caption_template",
    ),
    ("between 0 and 1", lambda value: 0 < value < 1, "model.ema.decay"),
    (
        "two below 1",
        lambda value: len(value) == 2 and all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in value),
        "model.optim.betas",
    ),
    (
        "a number of devices, -1, auto, or a list of their numbers",
        lambda value: isinstance(value, int | str | list) and value is not True and value not in (0, "0", []),
        "trainer.devices",
    ),
]
