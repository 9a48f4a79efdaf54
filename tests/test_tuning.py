"""Every way of tuning with and without the prior, cached or not: what it computes, changes, keeps and hands out."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from torch import nn

from dreambooth.callbacks.checkpoint import Checkpoint, newest
from dreambooth.callbacks.ema import Ema
from dreambooth.callbacks.export import Export
from dreambooth.errors import UserError
from dreambooth.families.base import own_weights
from dreambooth.families.sd import StableDiffusion
from dreambooth.sampling import draw
from dreambooth.tuning.full import Full
from dreambooth.tuning.lora import Lora
from tests.steps import CONSTANT, PROMPTS, Latents, module_of, run

ROOT = Path(__file__).parent.parent
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj"]
LORA = partial(Lora, rank=2, alpha=3, target_modules=LAYERS, seed=5)
TUNINGS: dict[str, tuple[Any, bool]] = {
    "full": (Full, False),
    "full and text encoder": (Full, True),
    "lora": (LORA, False),
    "lora and text encoder": (LORA, True),
    "dora and text encoder": (partial(LORA, use_dora=True), True),
    "rslora": (partial(LORA, use_rslora=True), False),
}
PLAIN = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0)  # what has no gradient does not change
HOW = {"steps": 2, "guidance": 3.0, "sampler_type": "DDIM", "resolution": 32}
PROMPT = PROMPTS["instance"]

SOURCES = [  # with the prior, from cached latents
    pytest.param(True, True, id="prior-cached"),
    pytest.param(False, False, id="alone-online"),
    pytest.param(True, False, id="prior-online", marks=pytest.mark.exhaustive),
    pytest.param(False, True, id="alone-cached", marks=pytest.mark.exhaustive),
]


def picture(pipeline: Any) -> np.ndarray:
    return np.asarray(draw(pipeline, [PROMPT], [3], **HOW)[0]).astype(int)


def frozen(module: Any) -> dict[str, torch.Tensor]:
    """A copy of every weight of the family that does not learn."""
    learn = {id(weight) for weight in module.learning()}
    return {
        f"{name}.{key}": weight.detach().clone()
        for name, network in module.family.networks.items()
        for key, weight in network.named_parameters()
        if id(weight) not in learn
    }


class Own(pl.Callback):
    """Our picture at the end, drawn before anything is exported."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        with pl_module.finished():
            self.picture = picture(pl_module.family.to_pipeline())


@pytest.mark.slow
@pytest.mark.parametrize(("prior", "cached"), SOURCES)
@pytest.mark.parametrize("name", TUNINGS)
def test_every_way(name: str, prior: bool, cached: bool, tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    tuning, text = TUNINGS[name]
    make = partial(module_of, tiny_sd, tuning=tuning, text=text, optim=PLAIN, prior_loss_weight=0.7)
    options: dict[str, Any] = {"prior": prior, "photos": None if cached else photos}
    module, own = make(), Own()
    check_the_loss(module, prior, photos=options["photos"])

    before, start = frozen(module), [weight.detach().clone() for weight in module.learning()]
    calls: list[pl.Callback] = [Checkpoint(1, -1), own, Export(merged=True)]
    _, rows = run(module, 2, callbacks=calls, default_root_dir=tmp_path / "whole", **options)
    assert all(row["grad_norm"] > 0 for row in rows)
    assert all(not torch.equal(*pair) for pair in zip(start, module.learning(), strict=True))
    assert before.keys() == frozen(module).keys()
    assert all(torch.equal(value, before[key]) for key, value in frozen(module).items())

    # One step, and another one in a new process' place.
    parts = tmp_path / "parts"
    run(make(), 1, callbacks=[Checkpoint(1, -1)], default_root_dir=parts, **options)
    resumed = make()
    found = newest(parts / "checkpoints", resumed.base)
    _, again = run(resumed, 2, callbacks=[Checkpoint(1, -1), Export()], resume=found, default_root_dir=parts, **options)
    assert again[-1]["loss"] == rows[-1]["loss"]
    state = module.state_dict()
    assert set(state) == {f"learned.{key}" for key in module.tuning.names}
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in state.items())

    # What others draw with it.
    folder = tmp_path / "whole"
    exported = StableDiffusionPipeline.from_pretrained(folder / "pipeline", safety_checker=None)
    assert np.array_equal(picture(exported), own.picture)
    assert (parts / "pipeline").exists() == (not module.tuning.saves_adapter)
    assert (folder / "adapter").exists() == module.tuning.saves_adapter
    if module.tuning.saves_adapter:
        base = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
        plain = picture(base)
        base.load_lora_weights(folder / "adapter")
        assert np.abs(picture(base) - own.picture).max() <= 1
        assert np.abs(plain - own.picture).max() > 1


def check_the_loss(module: Any, prior: bool, photos: Path | None) -> None:
    """The loss of a batch of both roles is that of a pass over each, with the same noise."""
    data = Latents(module.family, 2, 1, prior, "text_encoder" in module.learned, photos=photos)
    batch = data.stream().batch(3, 0)
    module.eval()
    loss = module.training_step(batch, 0)["loss"]
    parts = []
    for role in (False, True)[: 1 + prior]:
        rows = (batch["is_prior"] == role).nonzero().flatten().tolist()
        part: dict[str, Any] = {
            "step": 3,
            "global_size": 2,
            "index": [batch["index"][row] for row in rows],
            "prompts": [batch["prompts"][row] for row in rows],
            "is_prior": torch.zeros(len(rows), dtype=torch.bool),
        }
        part |= {key: batch[key][rows] for key in ("pixels", "moments") if key in batch}
        part |= {"cond": {key: value[rows] for key, value in batch["cond"].items()}} if "cond" in batch else {}
        parts.append(module.training_step(part, 0)["loss"])
    torch.testing.assert_close(loss, parts[0] + 0.7 * sum(parts[1:]), rtol=1e-5, atol=1e-6)
    module.train()
    module._losses.clear()
    module._quarters.clear()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
def test_an_adapter_is_added_once_and_taken_off_without_a_trace(tiny_sd: Path, tmp_path: Path, kind: str) -> None:
    """W + s·B·A, merged within itself once; off, or after it, the base bit for bit."""
    family, plain = StableDiffusion(str(tiny_sd)), StableDiffusion(str(tiny_sd))
    dora, s = kind == "dora", 3 / 2**0.5 if kind == "rslora" else 3 / 2
    tuning = LORA(family, use_dora=dora, use_rslora=kind == "rslora", train_text_encoder=True)
    for weight in tuning.weights().values():
        weight.data += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    learned = dict(tuning.learned.items())
    bases = {name: own_weights(plain.networks[name]) for name in learned}
    states = {name: network.state_dict() for name, network in learned.items()}

    def now() -> dict[str, dict[str, torch.Tensor]]:
        return {name: {k: v.clone() for k, v in own_weights(network).items()} for name, network in learned.items()}

    with tuning.merged():
        once = now()
        with tuning.merged():
            twice = now()
        assert family.fingerprint(fresh=True) != family.fingerprint() == plain.fingerprint()
    assert family.fingerprint(fresh=True) == plain.fingerprint()
    for name in learned:
        assert once[name].keys() == bases[name].keys()
        for key, base in bases[name].items():
            stem = key.removesuffix(".weight")
            a, b = (states[name].get(f"{stem}.lora_{part}.default.weight") for part in "AB")
            expected = base if a is None or b is None else base + s * b @ a
            if dora and a is not None:
                length = states[name][f"{stem}.lora_magnitude_vector.default.weight"]
                expected = length[:, None] * expected / expected.norm(dim=1, keepdim=True)
            torch.testing.assert_close(once[name][key], expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(once[name][key], twice[name][key])
            assert torch.equal(own_weights(learned[name])[key], base)
    with tuning.untouched():
        assert np.array_equal(picture(family.to_pipeline()), picture(plain.to_pipeline()))
    assert not np.array_equal(picture(family.to_pipeline()), picture(plain.to_pipeline()))

    # A file without the settings would be read with alpha = rank.
    tuning.save(tmp_path / "adapter")
    with safe_open(tmp_path / "adapter" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert '"unet.lora_alpha": 3' in file.metadata()["lora_adapter_metadata"]
        assert {key.split(".")[0] for key in list(file.keys())} == {"unet", "text_encoder"}
        assert all(".text_model." in key for key in list(file.keys()) if key.startswith("text_encoder"))


def test_the_adapter_begins_the_same_everywhere_and_is_refused_where_nothing_fits(tiny_sd: Path) -> None:
    first, second, other = (LORA(StableDiffusion(str(tiny_sd)), seed=seed) for seed in (5, 5, 6))
    pairs = list(zip(first.weights().values(), second.weights().values(), strict=True))
    assert all(torch.equal(*pair) for pair in pairs)
    assert not torch.equal(next(iter(first.weights().values())), next(iter(other.weights().values())))
    with pytest.raises(UserError, match=r"model\.tuning\.target_modules: the text_encoder takes no adapter"):
        LORA(StableDiffusion(str(tiny_sd)), target_modules=["to_q"], train_text_encoder=True)


def test_the_text_encoder_has_its_own_rate(tiny_sd: Path) -> None:
    module = module_of(tiny_sd, tuning=partial(Full, text_encoder_lr=1e-5), text=True, optim=PLAIN)
    trainer, rows = run(module, 1)
    rates = [(group["lr"], len(group["params"])) for group in trainer.optimizers[0].param_groups]
    sizes = [len(list(module.learned[name].parameters())) for name in ("unet", "text_encoder")]
    assert rates == [(1e-2, sizes[0]), (1e-5, sizes[1])]
    assert rows[0]["lr"] == 1e-2


@pytest.mark.parametrize("name", ["full and text encoder", "lora and text encoder"])
def test_recomputed_activations_change_nothing(name: str, tiny_sd: Path) -> None:
    tuning, text = TUNINGS[name]
    modules = [
        module_of(tiny_sd, tuning=tuning, text=text, optim=PLAIN, gradient_checkpointing=less) for less in (False, True)
    ]
    rows = [run(module, 3)[1] for module in modules]
    assert rows[1][-1] == pytest.approx(rows[0][-1], rel=1e-4, nan_ok=True)
    assert all(weight.requires_grad for weight in modules[1].learning())


class Moments(pl.Callback):
    """Whether the text encoder is still in the optimizer, step by step."""

    def __init__(self) -> None:
        self.kept: list[bool] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: object) -> None:
        weight = next(one for name, one in pl_module.tuning.weights().items() if name.startswith("text_encoder"))
        self.kept.append(weight in trainer.optimizers[0].state)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["lora and text encoder", "full and text encoder"])
def test_a_text_encoder_that_stops(name: str, tiny_sd: Path, tmp_path: Path) -> None:
    """From that step on it is what it was, the loss that of reading it online, and a resume before or after exact."""
    make = partial(
        module_of, tiny_sd, tuning=partial(TUNINGS[name][0], stop_text_encoder_at=2), text=True,
        sched=CONSTANT | {"name": "linear"}, optim=partial(torch.optim.AdamW, lr=1e-2),
    )  # fmt: skip

    def text(module: Any) -> list[torch.Tensor]:
        return [weight.detach().clone() for weight in module.learned["text_encoder"].parameters()]

    class Online(pl.Callback):
        """Freezes the text encoder at the same step, and goes on reading it."""

        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, *_: object) -> None:
            if batch["step"] == 2:
                pl_module.tuning.freeze_text_encoder()
                self.weights = text(pl_module)

    online = Online()
    reference = partial(make, tuning=TUNINGS[name][0])()
    _, expected = run(reference, 5, callbacks=[online])
    whole = make()
    calls = [Ema(0.5), Checkpoint(1, -1)]
    _, rows = run(whole, 5, callbacks=calls, default_root_dir=tmp_path)
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-5)
    assert all(torch.equal(*pair) for pair in zip(text(whole), online.weights, strict=True))
    assert len(whole.resting.known) == 2
    averages = dict(zip(whole.tuning.weights(), whole.ema, strict=True))
    for key, weight in whole.tuning.weights().items():  # the rest learned beside the weights that stay, not an average
        assert torch.equal(averages[key], weight) == key.startswith("text_encoder"), key
    for step in (1, 2, 3):
        resumed, moments = make(), Moments()
        path = tmp_path / "checkpoints" / f"step_{step:06d}.ckpt"
        run(resumed, 5, callbacks=[Ema(0.5), moments], resume=path)
        assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items()), step
        assert moments.kept == [number < 2 for number in range(step, 5)]


@pytest.mark.slow
def test_what_was_frozen_after_a_share_of_the_steps_stays_so_when_there_are_more(tiny_sd: Path, tmp_path: Path) -> None:
    make = partial(module_of, tiny_sd, tuning=partial(LORA, stop_text_encoder_at=0.5), text=True, optim=PLAIN)
    whole, longer = make(), make()
    run(whole, 4, callbacks=[Checkpoint(1, -1)], default_root_dir=tmp_path)
    run(longer, 8, resume=tmp_path / "checkpoints/step_000003.ckpt")
    assert (whole.stopped_at, longer.stopped_at) == (2, 3)
    same = {key: torch.equal(value, longer.state_dict()[key]) for key, value in whole.state_dict().items()}
    assert {key.split(".")[1] for key, equal in same.items() if equal} == {"text_encoder"}
    assert {key.split(".")[1] for key, equal in same.items() if not equal} == {"unet"}


def test_dropout_of_an_adapter_is_a_function_of_the_step(tiny_sd: Path, tmp_path: Path) -> None:
    """It changes what is learned, and a resume, whatever was drawn at random before, equals the unbroken run."""
    make = partial(module_of, tiny_sd, tuning=partial(LORA, dropout=0.5), text=True, optim=PLAIN)
    whole = make()
    _, rows = run(whole, 3, callbacks=[Checkpoint(1, -1)], default_root_dir=tmp_path)
    _, without = run(module_of(tiny_sd, tuning=LORA, text=True, optim=PLAIN), 3)
    assert rows[0]["loss"] == without[0]["loss"]  # B is 0
    assert rows[0]["grad_norm"] != without[0]["grad_norm"]
    assert rows[1]["loss"] != without[1]["loss"]
    torch.manual_seed(99)
    resumed = make()
    _, again = run(resumed, 3, resume=tmp_path / "checkpoints" / "step_000001.ckpt")
    assert [row["loss"] for row in again] == [row["loss"] for row in rows[1:]]
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", TUNINGS)
def test_a_teacher_instead_of_pictures(name: str, tiny_sd: Path, tmp_path: Path) -> None:
    """The class is asked for what the untouched base predicts of its prompt; resume is exact."""
    tuning, text = TUNINGS[name]
    make = partial(module_of, tiny_sd, tuning=tuning, text=text, optim=PLAIN, teacher=True)
    module = make()
    calls: list[pl.Callback] = [Checkpoint(1, -1)]
    _, rows = run(module, 3, callbacks=calls, default_root_dir=tmp_path)
    assert rows[0]["prior_loss"] == pytest.approx(0, abs=1e-10)  # nothing has been learned that could differ
    assert rows[0]["grad_norm"] > 0
    assert min(row["prior_loss"] for row in rows[1:]) > 1e-6
    resumed = make()
    run(resumed, 3, resume=tmp_path / "checkpoints" / "step_000001.ckpt")
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in module.state_dict().items())

    batch = Latents(module.family, 2, 1, True, text).stream().batch(7, 0)
    batch |= {"cond": module.family.encode_prompts(batch["prompts"])} if not text else {}
    check_the_teacher(module, StableDiffusion(str(tiny_sd)), batch)


def check_the_teacher(module: Any, plain: StableDiffusion, batch: dict[str, Any]) -> torch.Tensor:
    """The losses of the batch are those of a pass of each network, the class against the plain one's prediction."""
    seen: list[nn.Module] = []
    handle = module.family.unet.register_forward_pre_hook(lambda network, _: seen.append(network.training))
    with torch.no_grad():
        per_example = module.training_step(batch, 0)["per_example"]
        handle.remove()
        assert seen == [False, True]
        cond = module.family.encode_prompts(batch["prompts"])
        noise = module.draw(batch, "noise", (4, 8, 8))
        x0 = plain.sample_latents(batch["moments"], module.draw(batch, "posterior", (4, 8, 8)))
        t = module.objective.sample_t(module.draw_levels(batch))
        x_t = module.objective.add_noise(x0, noise, t)
        goal = torch.where(
            batch["is_prior"].view(-1, 1, 1, 1),
            plain.denoise(x_t, t, plain.encode_prompts(batch["prompts"])),
            module.objective.target(x0, noise, t),
        )
        expected = (module.family.denoise(x_t, t, cond) - goal).square().flatten(1).mean(1)
    torch.testing.assert_close(per_example, expected, rtol=1e-4, atol=1e-6)
    return per_example[batch["is_prior"]]


@pytest.mark.exhaustive
def test_two_ranks_stop_the_text_encoder_together(tiny_sd: Path, tmp_path: Path) -> None:
    """Two processes of batch 1 are one of batch 2, before and after the text encoder rests."""
    program = [sys.executable, "-m", "tests.tuning_ranks", str(tiny_sd), str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    subprocess.run(program, cwd=ROOT, env=env, check=True, timeout=120)
    one = module_of(tiny_sd, tuning=partial(LORA, stop_text_encoder_at=2), text=True, teacher=True)
    _, rows = run(one, 4, size=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["losses"] == pytest.approx([row["loss"] for row in rows], rel=1e-4)
    assert all(torch.equal(*pair) for pair in zip(first["weights"], second["weights"], strict=True))
    torch.testing.assert_close(first["weights"], [weight.detach() for weight in one.learning()], atol=2e-4, rtol=0)
