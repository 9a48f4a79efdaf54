"""task=evaluate and the evaluation in training, on real pictures of small models."""

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dreambooth import UserError, compose, config, train
from dreambooth.callbacks.evaluate import BEST, Evaluate
from dreambooth.evaluation import check_cards, evaluate
from dreambooth.generation import generate
from dreambooth.metrics.curves import read_curves
from dreambooth.metrics.measure import pictures_of, read_scores, table
from dreambooth.metrics.tradeoff import Tradeoff
from dreambooth.parallel.export import export
from dreambooth.picture_files import TEXT_CHUNK
from dreambooth.pocket import SUBJECTS
from dreambooth.run_folder import open_run
from dreambooth.tasks import RunResult
from tests.tiny import short_run

MEASURED = [
    "evaluate.prompts=[a photo of a sks dog,a photo of a sks dog at night]",
    "evaluate.num_images_per_prompt=2",
    "evaluate.num_class_images=3",
    "evaluate.inference_steps=2",
]
IMAGES = [f"evaluate.images={SUBJECTS / name}" for name in ("dog", "car")]


def settings(model: Path, folder: Path) -> list[str]:
    """A short run on the shipped dog, measured every second step on three pictures."""
    return [
        *short_run(model, SUBJECTS / "dog", folder),
        "callbacks.sample_grid=null",
        "callbacks.evaluate.every_n_train_steps=2",
        "callbacks.evaluate.num_images_per_prompt=1",
        "callbacks.evaluate.num_class_images=1",
        "callbacks.evaluate.patience=null",
        "callbacks.evaluate.max_drift=null",
        "callbacks.evaluate.max_forgetting=null",
        "callbacks.evaluate.target=null",
        *MEASURED,
    ]


@pytest.fixture(scope="module")
def finished(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """Five steps, measured at 0, 2, 4 and 5."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    return train(compose([*settings(tiny_sd, folder), "trainer.max_steps=5", "model.ema.decay=0.9"]))


def curves(folder: Path) -> list[dict[str, str]]:
    with (folder / "curves.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_run_is_measured_before_meanwhile_and_after(finished):
    folder, summary = finished.folder, finished.summary
    rows = curves(folder)
    assert [row["step"] for row in rows] == ["0", "2", "4", "5"]
    assert float(rows[0]["score"]) == 0
    best = max(rows[1:], key=lambda row: (float(row["score"]), int(row["step"])))
    assert summary["best_step"] == int(best["step"])
    assert summary["stopped"] is None
    assert summary["seconds"]["evaluate"] > 0
    for kind in ("before", "after"):
        assert len(list((folder / "evaluation" / kind).glob("*.png"))) == 7
        assert set(summary["metrics"][kind]) == {"dino", "clip_i", "clip_t", "pres", "div", "copy"}
        assert None not in summary["metrics"][kind].values()
    assert summary["metrics"]["real"]["pres"] is None
    assert summary["metrics"]["pictures"] == {"before": 7, "after": 7, "real": 5}
    scores = read_scores(folder / "evaluation" / "scores.jsonl")
    assert [row["set"] for row in scores] == ["real"] * 5 + ["before"] * 7 + ["after"] * 7
    subject = [row["dino"] for row in scores if (row["set"], row["role"]) == ("after", "subject")]
    assert sum(subject) / 4 == pytest.approx(summary["metrics"]["after"]["dino"])
    assert {row["nearest"] for row in scores if row["role"] == "subject"} <= {f"{i}.png" for i in range(5)}


@pytest.mark.slow
def test_tensorboard_is_told_every_score_of_the_curves(finished):
    events, rows = EventAccumulator(str(finished.folder / "tensorboard")).Reload(), curves(finished.folder)
    for name in ("dino", "clip_i", "clip_t", "pres", "copy", "score"):
        told = {event.step: event.value for event in events.Scalars(f"evaluate/{name}")}
        assert told == {int(row["step"]): pytest.approx(float(row[name]), abs=1e-5) for row in rows}, name


def test_no_picture_that_chooses_the_step_judges_it():
    """Not even with one seed for both: the curves' pictures have other noise than those of the table."""
    cfg = compose(["callbacks/evaluate=default", "seed=4321", *MEASURED])
    assert cfg.callbacks.evaluate.seed == cfg.evaluate.seed
    callback = config.build(cfg.callbacks.evaluate)(cfg)
    curve, final = (
        {picture["picture_seed"] for picture in pictures_of(asked, how, "", "", 64)}
        for asked, how in zip(callback.asked, (callback.curve, callback.final), strict=True)
    )
    assert len(curve) > 1 < len(final)
    assert not curve & final


@pytest.mark.parametrize("plus", ["", "++"])
@pytest.mark.parametrize("reason", ["patience=3", "max_drift=0.2", "max_forgetting=0.2", "target=0.75"])
def test_a_reason_to_stop_is_not_typed_where_nothing_is_measured(plus, reason):
    with pytest.raises(UserError, match=rf"^callbacks\.evaluate\.{reason}: .*_steps=null there is no curve"):
        compose([f"{plus}callbacks.evaluate.{reason}", "callbacks.evaluate.every_n_train_steps=null"])


@pytest.mark.parametrize(
    "typed",
    [
        ["callbacks.evaluate.every_n_train_steps=null"],
        ["callbacks.evaluate.every_n_train_steps=null", "callbacks.evaluate.patience=null"],
        ["experiment=overfitting", "callbacks.evaluate.every_n_train_steps=null"],
        ["experiment=overfitting", "callbacks.evaluate.patience=3"],
    ],
)
def test_reasons_of_the_cards_and_none_may_stand_where_nothing_is_measured(typed):
    evaluate = compose(typed).callbacks.evaluate
    assert evaluate.every_n_train_steps is None or evaluate.patience == 3


def test_what_is_exported_is_the_best_step(finished):
    best = load_file(finished.folder / "checkpoints" / "best.safetensors")
    exported = load_file(finished.folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {f"unet.{name}" for name in exported} == set(best)
    assert all(torch.equal(best[f"unet.{name}"], value) for name, value in exported.items())


@pytest.mark.slow
def test_measuring_again_gives_the_same_to_the_last_digit(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished.folder, run)
    before = (run / "evaluation" / "scores.jsonl").read_bytes()
    stamps = {path: path.stat().st_mtime_ns for path in run.glob("evaluation/*/*.png")}
    again = evaluate(compose([f"infer.model={run}", "task=evaluate"]))
    assert again.folder == run / "evaluation"  # the pipeline on disk is what was measured in training
    assert {path: path.stat().st_mtime_ns for path in run.glob("evaluation/*/*.png")} == stamps
    assert (run / "evaluation" / "scores.jsonl").read_bytes() == before
    assert again.metrics == finished.summary["metrics"]

    shutil.rmtree(run / "evaluation" / "after")  # drawn again from pipeline/
    evaluate(compose([f"infer.model={run}", "task=evaluate"]))
    assert (run / "evaluation" / "scores.jsonl").read_bytes() == before

    drawn = run / "evaluation" / "after" / "00002.png"
    drawn.write_bytes(drawn.read_bytes()[:-200])  # cut short behind its settings
    evaluate(compose([f"infer.model={run}", "task=evaluate"]))
    assert (run / "evaluation" / "scores.jsonl").read_bytes() == before
    noted = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert noted["best_step"] == finished.summary["best_step"]

    other = evaluate(compose([f"infer.model={run}", "task=evaluate", "evaluate.seed=5"]))
    assert other.folder == run / "evaluation-2"
    assert json.loads((run / "summary.json").read_text())["metrics"] == finished.summary["metrics"]


@pytest.mark.exhaustive
def test_measured_otherwise_a_run_keeps_its_own_figures(finished, tmp_path):
    """Likeness to other photos, or another order of averaging, is not what the run was measured by."""
    run = tmp_path / "run"
    shutil.copytree(finished.folder, run)
    before = {path: path.read_bytes() for path in (run / "summary.json", *run.glob("evaluation/*.json*"))}
    folders = []
    for typed in (f"evaluate.photos={SUBJECTS / 'car'}", "metrics.average=prompts", "~metrics.encoders.clip"):
        found = evaluate(compose([f"infer.model={run}", "task=evaluate", typed]))
        folders.append(found.folder.name)
        assert evaluate(compose([f"infer.model={run}", "task=evaluate", typed])).folder == found.folder
    assert folders == ["evaluation-2", "evaluation-3", "evaluation-4"]
    assert found.metrics["after"]["clip_t"] is None
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_damaged_settings_of_a_run_are_one_line(tmp_path):
    for damaged in ("", "{", "other: 1"):
        (tmp_path / "config.yaml").write_text(damaged)
        for task in (evaluate, generate, export):
            with pytest.raises(UserError, match=r"config\.yaml cannot be read .*name another run") as caught:
                task(compose([f"infer.model={tmp_path}", "infer.prompts=a"]))
            assert "\n" not in str(caught.value)


def test_the_best_step_is_exported_only_from_its_own_weights(tmp_path, caplog):
    """A killed run may have come further, to weights that the same steps do not come to again."""
    callback = Evaluate.__new__(Evaluate)
    callback.every, callback.tradeoff = 2, Tradeoff(0.9, None)
    for step, dino in ((0, 0.1), (2, 0.6), (4, 0.3)):
        callback.tradeoff.add(step, {"dino": dino, "pres": 0.1, "clip_t": 0.5})
    put: list[dict] = []
    trainer, module = SimpleNamespace(global_step=4, default_root_dir=tmp_path), SimpleNamespace(settle_on=put.append)
    assert callback._settle(trainer, module) == 4  # nothing was kept
    (tmp_path / "checkpoints").mkdir()
    for kept, exported in ((3, 4), (2, 2)):
        save_file({"w": torch.zeros(1)}, tmp_path / BEST, metadata={"step": str(kept)})
        assert callback._settle(trainer, module) == exported
    assert len(put) == 1
    assert "step 2 was the best, but" in caplog.text
    callback.every = None  # keeps none: the last
    assert callback._settle(trainer, module) == 4


def test_damaged_curves_are_one_line(tmp_path):
    for damaged in ("step,dino\n1,0.5\n", "step,dino,clip_i,clip_t,pres,div,copy,score\nx,,,,,,,\n"):
        (tmp_path / "curves.csv").write_text(damaged)
        with pytest.raises(UserError, match=r"curves\.csv cannot be read"):
            read_curves(tmp_path / "curves.csv")


def test_a_run_is_drawn_by_its_own_settings(finished, tmp_path):
    """Not by those of the command's cards, here another guidance and another word."""
    words = ["task=generate", f"infer.model={finished.folder}", f"infer.out_path={tmp_path}", "evaluate=default"]
    more = ["infer.inference_steps=2", "infer.num_images_per_prompt=1", "model.data.instance_prompt=a photo of a zwx"]
    with Image.open(generate(compose([*words, *more]))[0]) as picture:
        drawn = json.loads(picture.info[TEXT_CHUNK])
    own = OmegaConf.load(finished.folder / "config.yaml").infer
    assert own.unconditional_guidance_scale != 7.5
    assert drawn["unconditional_guidance_scale"] == own.unconditional_guidance_scale
    assert (drawn["prompt"], drawn["inference_steps"]) == (own.prompts[0], 2)


def test_real_pictures_are_not_measured_by_the_pocket_cards(tmp_path):
    Image.new("RGB", (512, 512)).save(tmp_path / "0.png")
    with pytest.raises(UserError, match=r"shows 512 pixels.*metrics=default"):
        evaluate(compose(["task=evaluate", f"evaluate.images={tmp_path}", "evaluate.prompts=a dog"]))


@pytest.mark.parametrize(
    ("typed", "complaint"),
    [
        ([], r"draws 512 pixels.*: type metrics=default evaluate=default evaluate\.photos=FOLDER_OF_PHOTOS, or"),
        (["metrics=default"], r"the cartoons in .*dog: type evaluate\.photos=FOLDER_OF_PHOTOS, and model.*a sks dog'$"),
        (["metrics=default", "evaluate.photos=null"], r"the cartoons in .*dog: type evaluate\.photos="),
        (["metrics=default", "evaluate.photos=photos"], None),
        (["metrics=default", "model.data.instance_dir=photos"], None),
        (["metrics=default", "model/data=pocket_cat"], None),
        (["model=sd15", "model.data.instance_dir=photos"], None),
    ],
)
def test_likeness_of_another_model_is_to_photos_that_were_typed(typed, complaint):
    """Not to the cartoon that the pocket's card shows, under that one's prompts."""
    cfg = compose(["task=evaluate", "infer.model=some/model", *typed])
    if complaint is None:
        check_cards(cfg, 512, "infer.model=some/model draws")
        return
    with pytest.raises(UserError, match=complaint) as error:
        check_cards(cfg, 512, "infer.model=some/model draws")
    assert "\n" not in str(error.value)
    check_cards(cfg, cfg.model.data.resolution, "infer.model=some/model draws")  # the pocket's own, or like it


@pytest.mark.slow
def test_a_pipeline_folder_has_no_before(finished, tmp_path, caplog):
    words = [f"infer.model={finished.folder / 'pipeline'}", f"evaluate.out_path={tmp_path / 'out'}"]
    caplog.set_level("INFO")
    found = evaluate(compose([*words, *MEASURED]))
    assert f"likeness is to the photos in {SUBJECTS / 'dog'}" in caplog.text
    assert found.folder == tmp_path / "out"
    assert set(found.metrics["before"].values()) == {None}
    assert found.metrics["after"]["dino"] == finished.summary["metrics"]["after"]["dino"]
    with pytest.raises(UserError, match=r"evaluate\.out_path: .*00000\.png"):
        evaluate(compose([*words, *MEASURED, "evaluate.seed=5"]))


@pytest.mark.slow
def test_a_folder_of_pictures_needs_no_model(tmp_path):
    cfg = [f"evaluate.images={SUBJECTS / 'dog'}", f"hydra.run.dir={tmp_path / 'out'}", "task=evaluate"]
    found = evaluate(compose([*cfg, "evaluate.prompts=a photo of a dog", f"evaluate.photos={SUBJECTS / 'car'}"]))
    assert found.metrics["pictures"] == {"before": 0, "after": 5, "real": 5}
    assert found.metrics["after"]["dino"] < 0.6 < found.metrics["real"]["dino"]
    assert found.metrics["after"]["pres"] is None

    lines = tmp_path / "prompts.txt"
    places = ("on the grass", "in a room", "in the city", "on the grass", "in a room")
    lines.write_text("".join(f"a photo of a dog {place}\n" for place in places))
    told = evaluate(compose([*cfg, f"evaluate.prompts={lines}"]))
    assert told.metrics["after"]["dino"] is None  # no photographs were named
    assert told.metrics["after"]["clip_t"] > found.metrics["after"]["clip_t"]

    (tmp_path / "one").mkdir()
    shutil.copy(SUBJECTS / "dog" / "0.png", tmp_path / "one")
    lonely = evaluate(compose([*cfg, "evaluate.prompts=a dog", f"evaluate.images={tmp_path / 'one'}"]))
    assert lonely.metrics["after"]["div"] is None
    notes = table(lonely.metrics).splitlines()[-2:]
    assert "pocket ViT" in notes[0]
    assert "without the rare word" in notes[0]
    assert notes[1] == "div is undefined: there is no second picture of any prompt"


@pytest.mark.exhaustive
def test_the_scores_of_other_pictures_are_never_written_over(tmp_path, monkeypatch):
    """Each folder of pictures has a run folder of its own, and where one is typed, a number."""
    monkeypatch.chdir(tmp_path)
    words = ["task=evaluate", "evaluate.prompts=a photo of a dog"]
    runs = [
        compose([*words[: number % 2 + 1], *more]).run_dir for number in (0, 1) for more in ([], IMAGES[:1], IMAGES[1:])
    ]
    assert len(set(runs)) == len(runs)
    folders = [evaluate(compose([*words, images, "hydra.run.dir=run"])).folder.name for images in (*IMAGES, *IMAGES)]
    assert folders == ["evaluation", "evaluation-2"] * 2
    for name, images in zip(folders, IMAGES, strict=False):
        shown = {row["file"] for row in read_scores(tmp_path / "run" / name / "scores.jsonl") if row["set"] == "after"}
        assert {Path(file).parent.name for file in shown} == {Path(images).name}
    for images, out in ((IMAGES[0], "run/evaluation-2"), (IMAGES[1], "run/evaluation")):
        with pytest.raises(UserError, match=r"evaluate\.out_path: .* has the scores of other pictures"):
            evaluate(compose([*words, images, f"evaluate.out_path={out}"]))
    by = f"evaluate.photos={IMAGES[1].partition('=')[2]}"
    assert evaluate(compose([*words, IMAGES[0], by, "hydra.run.dir=run"])).folder.name == "evaluation-3"
    with pytest.raises(UserError, match=r"evaluation has the scores of .* by other photos or metrics"):
        evaluate(compose([*words, IMAGES[0], by, "evaluate.out_path=run/evaluation"]))
    (tmp_path / "run" / "evaluation" / "scores.jsonl").write_text("{")
    evaluate(
        compose([*words, IMAGES[0], "hydra.run.dir=run", "evaluate.out_path=elsewhere"])
    )  # what is damaged is not asked


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([f"evaluate.images={SUBJECTS / 'dog'}", "evaluate.prompts=[a,b,c,d]"], "4 prompts for 5 pictures"),
        ([f"evaluate.images={SUBJECTS / 'dog'}", "evaluate.prompts=[a dog,a cat]"], "2 prompts for 5 pictures"),
        (["evaluate.images=nowhere", "evaluate.prompts=a dog"], r"evaluate\.images: cannot open nowhere"),
        (["evaluate.images=empty", "evaluate.prompts=a dog"], r"evaluate\.images: there is no picture"),
        ([f"evaluate.images={SUBJECTS / 'dog'}"], r"evaluate\.images: what do they show\? Type evaluate\.prompts="),
        (["infer.model=/nowhere"], r"infer\.model=/nowhere"),
        (["infer.model=empty", "evaluate.out_path=/proc/x"], r"evaluate\.out_path: /proc/x cannot be written"),
        (["evaluate.images=x", "evaluate.prompts=''"], r"evaluate\.prompts is empty"),
        (["metrics.text=neither"], r"metrics\.text=neither"),
        (["metrics.average=prompt"], r"metrics\.average=prompt: there is no such choice; did you mean 'prompts'"),
    ],
)
def test_bad_input_is_one_line(words, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=complaint) as error:
        evaluate(compose(["task=evaluate", *words]))
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_damaged_scores_file_is_one_line(tmp_path):
    (tmp_path / "scores.jsonl").write_text('{"set": "real"}\n{"set": ')
    with pytest.raises(UserError, match=r"scores\.jsonl cannot be read"):
        read_scores(tmp_path / "scores.jsonl")


@pytest.mark.slow
def test_a_resumed_run_has_the_curves_of_an_unbroken_one(finished, tiny_sd, tmp_path):
    words = [*settings(tiny_sd, tmp_path / "run"), "model.ema.decay=0.9"]
    save = ["callbacks.checkpoint.every_n_train_steps=3"]
    train(compose([*words, *save, "trainer.max_steps=3"]))
    rows = curves(tmp_path / "run")
    assert [row["step"] for row in rows] == ["0", "2", "3"]
    (tmp_path / "run" / "curves.csv").write_text((finished.folder / "curves.csv").read_text())  # measured, then killed
    result = train(compose([*words, *save, "trainer.max_steps=5"]))
    assert [row for row in curves(result.folder) if row["step"] != "3"] == curves(finished.folder)
    if 3 < result.summary["best_step"] == finished.summary["best_step"]:  # no picture of the shorter goal is left
        assert result.summary["metrics"] == finished.summary["metrics"]


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_measures_the_base_once(finished, tiny_sd, tmp_path):
    words = [*settings(tiny_sd, tmp_path / "run"), "model.ema.decay=0.9"]
    begun = tmp_path / "run"
    shutil.copytree(finished.folder / "evaluation" / "before", begun / "evaluation" / "before")
    (begun / "curves.csv").write_text(
        "".join((finished.folder / "curves.csv").read_text().splitlines(keepends=True)[:2])
    )
    open_run(compose([*words, "trainer.max_steps=5"]), begun)
    result = train(compose([*words, "trainer.max_steps=5"]))
    assert curves(result.folder) == curves(finished.folder)


@pytest.mark.slow
def test_lost_pictures_of_the_base_are_drawn_again_by_the_base(finished, tiny_sd, tmp_path):
    """Of a run whose training is done, as a benchmark leaves one that is to be measured again."""
    words = [*settings(tiny_sd, tmp_path / "run"), "trainer.max_steps=5", "model.ema.decay=0.9"]
    run = shutil.copytree(finished.folder, tmp_path / "run")
    files = [path.relative_to(run) for path in run.glob("evaluation/**/*") if path.suffix in (".png", ".jsonl")]
    made = {name: (run / name).read_bytes() for name in files}
    for spoil in (
        lambda evaluation: shutil.rmtree(evaluation),
        lambda evaluation: (evaluation / "before" / "00002.png").write_bytes(b"cut short"),
    ):
        spoil(run / "evaluation")
        (run / "summary.json").unlink()
        assert train(compose(words)).summary["metrics"] == finished.summary["metrics"]
        assert {name: (run / name).read_bytes() for name in files} == made


@pytest.mark.slow
def test_a_run_that_stopped_goes_on_when_nothing_is_to_stop_it(tiny_sd, tmp_path):
    words = [*settings(tiny_sd, tmp_path / "run"), "trainer.max_steps=8", "model.optim.lr=1e-9"]
    stopped = train(compose([*words, "callbacks.evaluate.patience=2"]))
    assert (stopped.summary["steps"], "stopped" in stopped.summary) == (6, True)
    longer = train(compose([*words, "callbacks.evaluate.patience=null"]))
    assert (longer.summary["steps"], longer.summary["resumed_from"]) == (8, 6)
    assert longer.summary.get("stopped") is None


@pytest.mark.slow
def test_a_run_told_to_train_too_long_stops_and_says_why(tiny_sd, tmp_path):
    words = [*settings(tiny_sd, tmp_path / "run"), "trainer.max_steps=60"]
    result = train(compose([*words, "callbacks.evaluate.patience=2", "model.optim.lr=1e-9"]))  # nothing can rise
    assert "likeness has not risen in 2 evaluations" in result.summary["stopped"]
    assert result.summary["steps"] == 6
    assert train(compose([*words, "callbacks.evaluate.patience=2", "model.optim.lr=1e-9"])) == result  # finished
