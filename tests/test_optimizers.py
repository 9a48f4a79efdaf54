"""The cards of optimizers: two steps, a resume, and what a Schedule-Free one made is what is looked at and exported."""

import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from dreambooth.callbacks.checkpoint import Checkpoint, newest
from dreambooth.config import build, compose
from dreambooth.errors import UserError
from dreambooth.families.sd import StableDiffusion
from dreambooth.parallel.tensors import read
from dreambooth.tasks import train
from tests.steps import module_of, run
from tests.tiny import short_run

CARDS = ("adamw", "adafactor", "prodigy", "schedule_free")


def optim(card: str, *more: str) -> Any:
    return build(compose([f"model/optim={card}", "model.learning_rate=1e-3", *more]).model.optim)


class Look(pl.Callback):
    """Enters ``averaged()`` after every step, as a sample grid does."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: object) -> None:
        with pl_module.averaged():
            pass


def go(model: Path, folder: Path, card: str, steps: int, *callbacks: pl.Callback) -> Any:
    """Train to step ``steps`` in ``folder``, going on where it stands."""
    module = module_of(model, optim=optim(card))
    resume = newest(folder / "checkpoints", module.base)
    keep = {"enable_checkpointing": True, "default_root_dir": folder}
    run(module, steps, size=1, resume=resume, callbacks=[*callbacks, Checkpoint(1)], gradient_clip_val=1.0, **keep)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
def test_two_steps_and_a_resume_are_four_steps(tiny_sd: Path, tmp_path: Path, card: str, capfd: Any) -> None:
    """Bit for bit, and whether or not anybody looks; every weight learns; nothing is printed."""
    whole = go(tiny_sd, tmp_path / "whole", card, 4, Look())
    go(tiny_sd, tmp_path / "parts", card, 2)
    parts = go(tiny_sd, tmp_path / "parts", card, 4)
    base = StableDiffusion(str(tiny_sd)).unet.parameters()
    for old, one, other in zip(base, whole.learning(), parts.learning(), strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(old, one)
        assert one.isfinite().all()
    assert "decoupled" not in capfd.readouterr().out


def test_schedule_free_is_evaluated_at_its_average(tiny_sd: Path) -> None:
    """x = y + (1 - 1 / beta) (z - y) within ``averaged()``, and y again afterwards; chosen weights stay as they are."""
    module = module_of(tiny_sd, optim=optim("schedule_free", "model.optim.betas=[0.8,0.99]"))
    run(module, 3, size=1)
    y = [weight.detach().clone() for weight in module.learning()]
    z = [module.optimizer.state[weight]["z"] for weight in module.learning()]
    with module.averaged():
        for weight, one, other in zip(module.learning(), y, z, strict=True):
            torch.testing.assert_close(weight.data, one + (1 - 1 / 0.8) * (other - one))
        chosen = {name: value.clone() for name, value in module.learned.state_dict().items()}
    assert all(torch.equal(*pair) for pair in zip(module.learning(), y, strict=True))
    module.settle_on(chosen)
    with module.averaged():
        assert all(torch.equal(value, chosen[name]) for name, value in module.learned.state_dict().items())


@pytest.mark.slow
def test_the_export_of_schedule_free_is_its_average(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    words = [*short_run(tiny_sd, photos, tmp_path / "run"), "model/optim=schedule_free", "trainer.max_steps=3"]
    result = train(compose([*words, "callbacks.sample_grid=null", "callbacks.evaluate=null", "logger=none"]))
    path = next((result.folder / "checkpoints").glob("*.ckpt"))
    ys, zs = read(path, "weights/"), read(path, "optimizer/z/")
    exports = StableDiffusion(str(result.folder / "pipeline")).unet.named_parameters()
    for name, exported in exports:
        y, z = ys[f"unet.{name}"], zs[f"unet.{name}"]
        torch.testing.assert_close(exported.data, y + (1 - 1 / 0.9) * (z - y))
        assert not torch.equal(exported, y)
    assert json.loads((result.folder / "summary.json").read_text())["steps"] == 3


@pytest.mark.parametrize("card", ["prodigy", "schedule_free"])
def test_a_missing_package_is_one_line_with_its_name(card: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = {"prodigy": "prodigyopt", "schedule_free": "schedulefree"}[card]
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(UserError, match=f"pip install {package}$") as caught:
        optim(card)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_8_bits_need_a_gpu() -> None:
    with pytest.raises(UserError, match=r"CUDA GPU, and pip install bitsandbytes; .*model/optim=adafactor"):
        optim("adamw_8bit")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_moments_of_8_bits(tiny_sd: Path) -> None:
    """Every weight learns; the moments of those with 4096 numbers and more take a byte each."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    module = module_of(tiny_sd, optim=optim("adamw_8bit"))
    trainer, _ = run(module, 2, size=1, accelerator="gpu")
    base = StableDiffusion(str(tiny_sd)).unet.parameters()
    for old, new in zip(base, module.learning(), strict=True):
        assert new.isfinite().all()
        assert not torch.equal(old, new.cpu())
    state = trainer.optimizers[0].state
    kinds = {state[weight]["state1"].dtype for weight in module.learning() if weight.numel() >= 4096}
    assert kinds == {torch.uint8}


def test_any_other_optimizer_by_its_class(tiny_sd: Path) -> None:
    other = "model.optim._target_=torch.optim.RMSprop"
    _, rows = run(module_of(tiny_sd, optim=optim("adamw", other, "~model.optim.betas")), 1)
    assert rows[0]["lr"] == 1e-3
    with pytest.raises(UserError, match=r"'betas' of RMSprop; leave it out with ~model\.optim"):
        optim("adamw", other)


@pytest.mark.slow
def test_settings_that_undo_an_optimizer_are_refused() -> None:
    with pytest.raises(UserError, match=r"model\.ema\.decay"):
        compose(["model/optim=schedule_free", "model.ema.decay=0.9"])
    with pytest.raises(UserError, match=r"type model\.optim\.lr=1$"):  # a rate that is AdamW's
        compose(["model/optim=prodigy", "model.optim.lr=1e-5"])
    with pytest.raises(UserError, match=r"model\.tuning\.text_encoder_lr: Prodigy"):
        compose(["model/optim=prodigy", "model.train_text_encoder=true", "model.tuning.text_encoder_lr=1e-5"])
    assert compose(["model/optim=prodigy"]).model.optim.lr == 1.0
