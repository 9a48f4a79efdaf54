"""A killed run goes on as if nothing had happened."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dreambooth.callbacks.checkpoint import Checkpoint, checkpoints, newest
from dreambooth.callbacks.ema import Ema
from dreambooth.callbacks.nan_guard import NanGuard
from dreambooth.errors import UserError
from dreambooth.parallel import tensors
from dreambooth.parallel.checkpoint import FORMAT, load
from dreambooth.parallel.tensors import Entry, read, read_notes, write
from tests.steps import CONSTANT, module_of, run

EVERYTHING: dict[str, Any] = {
    "text": True,
    "noise_offset": 0.1,
    "sched": CONSTANT | {"name": "linear", "warmup_steps": 3},
}


def go(model: Path, folder: Path, stop: int | None = None, **options: Any) -> Any:
    """Train to step 7 in ``folder``, going on where it stands; ``stop`` ends it as a crash at that step would."""

    class Crash(Checkpoint):
        def on_train_batch_end(self, trainer: Any, *_: object) -> None:
            super().on_train_batch_end(trainer)
            if trainer.global_step == stop:
                raise ConnectionError

    module = module_of(model, **EVERYTHING)
    for layer in module.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.1
    resume = newest(folder / "checkpoints", module.base)
    callbacks = [Ema(0.9), NanGuard(3), Crash(2, save_last_k=2)]
    run(module, 7, callbacks=callbacks, resume=resume, enable_checkpointing=True, default_root_dir=folder, **options)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(("options", "stops"), [({"accumulate_grad_batches": 3, "size": 1}, (3, 4, 6)), ({}, (2,))])
def test_resume_is_exact(tiny_sd: Path, tmp_path: Path, options: dict[str, Any], stops: tuple[int, ...]) -> None:
    """Weights, averages and optimizer are bit for bit those of a run that was never stopped."""
    whole = go(tiny_sd, tmp_path / "whole", **options)
    for stop in stops:
        with pytest.raises(ConnectionError):
            go(tiny_sd, tmp_path / "parts", stop, **options)
    parts = go(tiny_sd, tmp_path / "parts", **options)
    assert [path.name for path in checkpoints(tmp_path / "parts" / "checkpoints")] == [
        "step_000006.ckpt",
        "step_000007.ckpt",
    ]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    files = [tmp_path / run / "checkpoints/step_000007.ckpt" for run in ("whole", "parts")]
    assert read_notes(files[0]) == read_notes(files[1])
    a, b = (read(file, "") for file in files)
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    kinds = {"weights", "averages", "optimizer/exp_avg", "optimizer/exp_avg_sq", "optimizer/step"}
    assert {re.sub(r"/(unet|text_encoder)\..*", "", name) for name in a} == kinds


def test_which_checkpoint(tiny_sd: Path, tiny_sd_v: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The newest whole file counts; none of another model; leftovers of a killed write are swept away."""
    folder = tmp_path / "checkpoints"
    assert newest(folder, "any") is None
    module = go(tiny_sd, tmp_path)
    last = folder / "step_000007.ckpt"
    assert newest(folder, module.base) == last
    with pytest.raises(UserError, match="another model"):
        newest(folder, module_of(tiny_sd_v).base)
    (folder / "step_000009.ckpt").write_bytes(last.read_bytes()[:-1000])
    (folder / "last.ckpt").touch()
    assert newest(folder, module.base) == last
    assert "step_000009.ckpt is damaged" in caplog.text
    for path in checkpoints(folder):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint .* can be read"):
        newest(folder, module.base)


@pytest.mark.parametrize(
    ("notes", "learning", "averaged", "line"),
    [
        ({"format": FORMAT + 1}, ["a"], False, r"has another format than this version reads: type resume=false"),
        ({}, ["a", "b"], False, r"holds other parameters or averages .* type the settings .*, or resume=false"),
        ({}, [], False, r"holds other parameters or averages"),
        ({}, ["a"], True, r"holds other parameters or averages"),
        ({"groups": [{}, {}]}, ["a"], False, r"has other groups of parameters than model\.optim .* resume=false"),
    ],
)
def test_what_does_not_fit_the_run_is_refused(
    tmp_path: Path, notes: dict[str, Any], learning: list[str], averaged: bool, line: str
) -> None:
    """A checkpoint of one parameter and one group, without averages: nothing of it is put anywhere."""
    path = tmp_path / "step_000002.ckpt"
    entry = Entry("weights/a", (2,), torch.float32, lambda: (0, torch.ones(2)))
    write(path, [entry], {"format": FORMAT, "groups": [{}]} | notes)
    layout = SimpleNamespace(named=lambda: dict.fromkeys(learning), groups=lambda: [{}])
    module = SimpleNamespace(layout=layout, ema=object() if averaged else None)
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))} {line}"):
        load(None, module, path)


def test_a_checkpoint_that_another_process_removes_meanwhile_is_said(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "step_000002.ckpt"
    write(path, [], {"format": FORMAT, "groups": []})

    def last_look(path: Path) -> dict[str, Any]:
        notes = read_notes(path)
        path.unlink()
        return notes

    monkeypatch.setattr(tensors, "read_notes", last_look)
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))} is gone: a newer one .*; type the command again$"):
        load(None, None, path)
