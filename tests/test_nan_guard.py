"""The guard against losses that are not finite."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.plugins import MixedPrecision

from dreambooth.callbacks.checkpoint import Checkpoint, newest
from dreambooth.callbacks.nan_guard import NanGuard
from dreambooth.errors import UserError
from dreambooth.parallel.checkpoint import Resume
from dreambooth.parallel.tensors import read
from tests.steps import module_of, run


def test_stops_and_names_the_pictures(tiny_sd: Path, tmp_path: Path) -> None:
    """A bad picture in every step: the run ends within twice the patience, and what it saved is finite."""
    module = module_of(tiny_sd)
    with pytest.raises(UserError) as caught:
        run(
            module,
            50,
            size=5,
            poison="instance/3",
            callbacks=[NanGuard(4), Checkpoint(1)],
            default_root_dir=tmp_path,
            enable_checkpointing=True,
        )
    message = str(caught.value)
    assert "4 steps in a row" in message
    assert "instance/3 for" in message
    assert "instance/2" not in message
    assert module.trainer.global_step == 4
    saved = newest(tmp_path / "checkpoints", module.base)
    assert saved is not None
    assert all(weight.isfinite().all() for weight in read(saved, "").values())


def test_lets_a_rare_one_pass_and_reads_rarely(tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bad step in five is skipped; a short run of nothing else is not called finished."""
    readings = []
    monkeypatch.setattr(
        NanGuard, "check", lambda self, trainer, real=NanGuard.check: (readings.append(1), real(self, trainer))
    )
    _, rows = run(module_of(tiny_sd), 20, size=1, poison="instance/3", callbacks=[NanGuard(4)])
    assert sum(row["loss"] != row["loss"] for row in rows) == 4
    assert len(readings) == 20 // 4 + 1
    with pytest.raises(UserError, match="2 steps in a row"):
        run(module_of(tiny_sd), 2, size=5, poison="instance/3", callbacks=[NanGuard(10)])


def test_a_run_that_was_refused_at_its_end_is_not_finished_by_typing_it_again(tiny_sd: Path, tmp_path: Path) -> None:
    """What its last step would have saved is not saved, so there is a step left to be refused."""
    for _ in range(2):
        callbacks = [NanGuard(4), Checkpoint(1)]
        kept = newest(tmp_path / "checkpoints", module_of(tiny_sd).base)
        callbacks += [Resume(kept)] if kept else []
        with pytest.raises(UserError, match="steps in a row"):
            run(
                module_of(tiny_sd),
                3,
                size=5,
                poison="instance/3",
                callbacks=callbacks,
                default_root_dir=tmp_path,
                enable_checkpointing=True,
            )
        assert not (tmp_path / "checkpoints" / "step_000003.ckpt").exists()


def test_gradients_that_are_no_numbers_end_a_run_whose_loss_is_fine(tiny_sd: Path) -> None:
    module = module_of(tiny_sd)
    before = [weight.detach().clone() for weight in module.learning()]
    module.learning()[0].register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(UserError, match=r"^the gradients were not finite for 3 steps in a row"):
        run(module, 8, callbacks=[NanGuard(3)])
    assert all(torch.equal(old, new) for old, new in zip(before, module.learning(), strict=True))


@pytest.mark.exhaustive
def test_a_scaler_may_look_for_its_scale_but_not_forever(tiny_sd: Path) -> None:
    """Half precision overflows by design until the scale fits; what overflows below 1 was no matter of scale."""
    for scale, ends in ((2.0**24, False), (2.0**3, True)):
        module = module_of(tiny_sd)
        module.learning()[0].register_hook(lambda gradient: gradient * torch.inf)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        more = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)], "callbacks": [NanGuard(3)]}
        with pytest.raises(UserError, match="gradients were not finite") if ends else nullcontext():
            run(module, 8, **more)


def test_what_is_allowed_does_not_depend_on_where_a_run_went_on(tiny_sd: Path) -> None:
    """One step of a hundred may be skipped, also when it is the only one since the run was resumed."""
    guard, module = (
        NanGuard(4),
        SimpleNamespace(
            device="cpu", loss_scale=None, step_metrics=dict.fromkeys(("loss", "grad_norm"), torch.tensor(torch.nan))
        ),
    )
    trainer: Any = SimpleNamespace(global_step=99, max_steps=100, accumulate_grad_batches=1)
    guard.on_train_start(trainer, module)  # type: ignore[arg-type]
    trainer.global_step = 100
    outputs = {"per_example": torch.tensor([torch.nan])}
    guard.on_train_batch_end(trainer, module, outputs, {"paths": ["a"]}, 0)
    guard.on_train_end(trainer, module)  # type: ignore[arg-type]
    assert int(guard.longest) == 1
