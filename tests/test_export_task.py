"""task=export: what a checkpoint holds, without the job."""

import shutil
from pathlib import Path

import pytest

from dreambooth import UserError, compose, train
from dreambooth.parallel.export import export
from tests.tiny import short_run


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [["model.ema.decay=0.9"], ["model/optim=schedule_free", "~callbacks.ema"]],
    ids=["average", "schedule_free"],
)
def test_the_newest_checkpoint_is_exported_as_the_run_would(
    words: list[str], tiny_sd: Path, photos: Path, tmp_path: Path
) -> None:
    """Averages of the run or of its optimizer included; before there is anything to export it says so."""
    quiet = ["callbacks.sample_grid=null", "callbacks.evaluate=null", "logger=none", "trainer.max_steps=3"]
    run = train(compose([*short_run(tiny_sd, photos, tmp_path / "run"), *words, *quiet])).folder
    wanted = compose(["task=export", f"infer.model={run}"])
    with pytest.raises(UserError, match="finished"):
        export(wanted)
    expected = {path.relative_to(run): path.read_bytes() for path in (run / "pipeline").rglob("*.safetensors")}
    shutil.rmtree(run / "pipeline")
    (run / "summary.json").unlink()
    export(wanted)
    assert {path.relative_to(run): path.read_bytes() for path in (run / "pipeline").rglob("*.safetensors")} == expected
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint yet"):
        export(wanted)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"infer\.model=.*there is no run in it"):
        export(compose(["task=export", f"infer.model={tmp_path}"]))
