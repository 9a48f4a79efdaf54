"""task=benchmark: protocols, sharing out, kills, and tables."""

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from dreambooth import UserError, compose
from dreambooth.benchmark import results
from dreambooth.benchmark.protocol import POCKET_PROMPTS, parse, tasks_of
from dreambooth.benchmark.task import alone, benchmark, share, take_one_gpu, tree_of
from dreambooth.config import command_of
from tests.layouts import LAYOUT, small

GOOGLE = Path(__file__).parents[2] / "shared" / "data" / "dreambooth"


def test_the_layout_is_read(layout):
    assert parse(LAYOUT)[0] == {"dog": "dog", "teapot": "teapot", "absent": "toy"}
    dog, teapot = tasks_of(compose(["benchmark=paper", f"benchmark.folder={layout}"]).benchmark)
    assert dog.prompts == ["a {0} {1} in a chef outfit"]
    assert teapot.prompts == ["a {0} {1} in the jungle", "a cube shaped {0} {1}"]
    changes = teapot.settings("sks", compose().benchmark, Path("run"))
    assert changes["evaluate"]["prompts"] == ["a sks teapot in the jungle", "a cube shaped sks teapot"]
    assert changes["model"]["data"]["instance_prompt"] == "a photo of a sks teapot"
    assert changes["model"]["data"]["regularization_prompt"] == "a photo of a teapot"


def test_another_noun_or_none_is_learned_but_the_own_class_is_measured(layout):
    dog = tasks_of(compose(["benchmark=paper", f"benchmark.folder={layout}"]).benchmark)[0]
    for noun, learned, prior, prompt in (
        ("boot", "a photo of a sks boot", "a photo of a boot", "a sks boot in a chef outfit"),
        ("", "a photo of a sks", "a photo of a dog", "a sks in a chef outfit"),
    ):
        changes = dog.settings("sks", compose([f"benchmark.noun='{noun}'"]).benchmark, Path("run"))
        data, measured = changes["model"]["data"], changes["evaluate"]
        assert (data["instance_prompt"], data["regularization_prompt"]) == (learned, prior)
        assert (measured["prompts"], measured["class_prompts"]) == ([prompt], "a photo of a dog")


def test_a_few_photos_are_learned_and_likeness_is_to_all(layout, tmp_path):
    dog = tasks_of(compose(["benchmark=paper", f"benchmark.folder={layout}"]).benchmark)[0]
    changes = dog.settings("sks", compose(["benchmark.num_photos=2"]).benchmark, tmp_path)
    dog.choose_photos(2, tmp_path)
    learned = Path(changes["model"]["data"]["instance_dir"])
    assert sorted(path.name for path in learned.iterdir()) == ["0.png", "1.png"]
    assert (learned / "0.png").read_bytes() == (layout / "dog" / "0.png").read_bytes()
    assert changes["evaluate"]["photos"] == str(layout / "dog")
    other = dog.settings("sks", compose(["benchmark.num_photos=3"]).benchmark, tmp_path)
    assert other["model"]["data"]["instance_dir"] != str(learned)  # so that a run of two is none of three
    with pytest.raises(UserError, match=r"benchmark\.num_photos=9, but .* has 5"):
        tasks_of(compose(["benchmark=paper", f"benchmark.folder={layout}", "benchmark.num_photos=9"]).benchmark)


@pytest.mark.skipif(not GOOGLE.is_dir(), reason="google/dreambooth is not here")
def test_googles_own_file():
    classes, objects, live = parse((GOOGLE / "prompts_and_classes.txt").read_text())
    assert (len(classes), len(objects), len(live)) == (30, 25, 25)
    assert sum(noun in ("cat", "dog") for noun in classes.values()) == 9
    tasks = tasks_of(compose(["benchmark=paper", f"benchmark.folder={GOOGLE}"]).benchmark)
    assert {"dog", "teapot", "vase"} <= {task.name for task in tasks}


def test_the_pockets_protocols():
    assert [len(task.prompts) for task in tasks_of(compose().benchmark)] == [12] * 10
    short = tasks_of(compose(["benchmark=pocket_short"]).benchmark)
    assert [(task.name, len(task.prompts)) for task in short] == [("cat2", 6), ("dog", 6), ("teapot", 6)]
    assert len(set(POCKET_PROMPTS)) == 12


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["benchmark=paper"], r"benchmark\.folder is not set"),
        (["benchmark=paper", "benchmark.folder=/nowhere"], r"benchmark\.folder: /nowhere"),
        (["benchmark.subjects=[dog,cow]"], r"benchmark\.subjects: cow not in pocket"),
        (["callbacks.evaluate=null"], r"callbacks\.evaluate is null"),
        (["callbacks.summary=null"], r"callbacks\.summary is null"),
        (["resume=false"], r"resume=false: .* type hydra\.run\.dir=ANOTHER_FOLDER$"),
        (["resume=false", "benchmark.runs_dir=runs"], r"hydra\.run\.dir=ANOTHER_FOLDER and benchmark\.runs_dir=null$"),
    ],
)
def test_bad_input_is_one_line(words, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=complaint) as error:
        benchmark(compose(["task=benchmark", *words]))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_subject_without_photos_is_said_before_another_is_trained(layout):
    for photo in (layout / "teapot").iterdir():
        photo.unlink()
    with pytest.raises(UserError, match=r"^benchmark\.folder: .*teapot"):
        tasks_of(compose(["benchmark=paper", f"benchmark.folder={layout}"]).benchmark)


def test_scores_that_are_cut_short_are_none(tmp_path):
    """At the end of a line, too, and where what is left is no row."""
    metrics = {"after": {"dino": 0.5}, "pictures": {"before": 0, "after": 2, "real": 1}}
    (tmp_path / "summary.json").write_text(json.dumps({"metrics": metrics}))
    (tmp_path / "evaluation").mkdir()
    scores = tmp_path / "evaluation" / "scores.jsonl"
    rows = [json.dumps({"set": name, "file": "0.png"}) + "\n" for name in ("real", "after", "after")]
    scores.write_text("".join(rows))
    assert results.measured(tmp_path) == metrics
    for left in ("", "".join(rows[:-1]), "5\n", rows[0] + '{"set": "after"}\n', "".join(rows)[:-9]):
        scores.write_text(left)
        assert results.measured(tmp_path) is None, left


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "4"}, (1, 4)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, (3, 4)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1)),  # a script without srun
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "3"}, (2, 3)),
        (
            {"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_STEP": "2", "SLURM_ARRAY_TASK_COUNT": "3"}
            | {"SLURM_ARRAY_TASK_MIN": "0", "RANK": "1", "WORLD_SIZE": "2"},
            (5, 6),
        ),
        # submitit's array is of the settings of a sweep, each for all subjects
        ({"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_COUNT": "6", "SUBMITIT_EXECUTOR": "slurm"}, (0, 1)),
    ],
)
def test_subjects_are_dealt_out(env, expected, monkeypatch):
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert share() == expected
    with alone():  # Lightning finds no group
        assert not {"RANK", "WORLD_SIZE", "SLURM_PROCID"} & set(os.environ)
    assert share() == expected  # the next job of a sweep is dealt its own


def test_the_run_of_a_subject_knows_the_command_of_its_benchmark(tmp_path):
    cfg = compose(["task=benchmark", "benchmark=pocket_short", f"hydra.run.dir={tmp_path}"])
    tree = tree_of(cfg, tasks_of(cfg.benchmark)[0], tmp_path / "dog")
    assert command_of(tree) == f"dreambooth task=benchmark benchmark=pocket_short hydra.run.dir={tmp_path}"


def test_an_array_with_gaps_is_refused(monkeypatch):
    for name, value in {"ID": "3", "MIN": "0", "MAX": "3", "COUNT": "3", "STEP": "1"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    with pytest.raises(UserError, match="gaps"):
        share()


@pytest.mark.parametrize(
    ("local", "visible", "there", "expected"),
    [
        ({"LOCAL_RANK": "2"}, None, 4, "2"),
        ({"SLURM_LOCALID": "1"}, "5,7", 8, "7"),
        ({"SLURM_LOCALID": "3"}, "6", 8, "6"),  # --gpus-per-task: it sees its own alone
        ({}, "4,5", 8, "4,5"),
        ({"LOCAL_RANK": "1"}, None, 0, None),
    ],
)
def test_each_process_of_a_node_takes_a_gpu_of_its_own(local, visible, there, expected, monkeypatch):
    for name, value in {"LOCAL_RANK": None, "SLURM_LOCALID": None, "CUDA_VISIBLE_DEVICES": visible, **local}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    take_one_gpu()
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == expected


@pytest.mark.parametrize("typed", ["trainer.devices=2", "trainer.num_nodes=2", "trainer.devices=[0,1]"])
def test_several_processes_for_a_subject_are_refused_before_anything(typed: str, layout, tmp_path) -> None:
    """Each would forget its place, take itself for the first, and start others."""
    words = [*small(tmp_path / "no model", layout, tmp_path / "out"), "callbacks/evaluate=default", typed]
    line = r"^trainer\.devices=.*type trainer\.devices=1 trainer\.num_nodes=1.*srun, torchrun .*hydra\.run\.dir$"
    with pytest.raises(UserError, match=line):
        benchmark(compose(words))
    assert not (tmp_path / "out").exists()


def test_what_was_measured_on_the_way_is_averaged_by_step(tmp_path):
    head = "step,dino,clip_i,clip_t,pres,div,copy,score\n"
    for name, rows in (("a", "0,0.1,,,0.2,,,\n5,0.5,,,0.3,,,\n"), ("b", "0,0.3,,,0.2,,,\n5,0.7,,,,,,\n9,0.8,,,,,,\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "curves.csv").write_text(head + rows)
    rows = results.curves({"a": tmp_path / "a", "b": tmp_path / "b", "unfinished": tmp_path / "c"})
    assert [(row["step"], row["subjects"]) for row in rows] == [(0, 2), (5, 2), (9, 1)]
    assert [row["dino"] for row in rows] == pytest.approx([0.2, 0.6, 0.8])
    assert (rows[1]["pres"], rows[2]["pres"]) == (0.3, None)
    assert "| 5 | 2 | 0.600 | - |" in results.write_curves(tmp_path, rows)
    assert results.write_curves(tmp_path / "none", rows[:2]) == ""


@pytest.mark.slow
def test_two_shares_make_one_table_and_a_broken_subject_is_redone_alone(tiny_sd, layout, tmp_path, monkeypatch):
    words = small(tiny_sd, layout, tmp_path / "out")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    half = benchmark(compose(words))
    assert [row["subject"] for row in half.rows][:-3] == ["teapot"]
    monkeypatch.setenv("RANK", "0")
    whole = benchmark(compose(words))
    assert [row["subject"] for row in whole.rows][:-3] == ["dog", "teapot"]
    dog, teapot, average = whole.rows[:3]
    kept = list((tmp_path / "out-base").glob("*/00000.png"))  # of the untouched base, for the next sweep
    drawn = [tmp_path / "out" / name / "evaluation" / "before" / "00000.png" for name in ("dog", "teapot")]
    assert sorted(path.read_bytes() for path in kept) == sorted(path.read_bytes() for path in drawn)
    assert average["dino"] == pytest.approx((dog["dino"] + teapot["dino"]) / 2)
    assert len(average["dino_interval"]) == 2
    with (tmp_path / "out" / "benchmark.csv").open() as file:
        assert [row["subject"] for row in csv.DictReader(file)] == [row["subject"] for row in whole.rows]
    assert "paper: DreamBooth (Stable Diffusion) | 0.668 | 0.803 | 0.305" in results.markdown(whole.rows)
    # Told to measure nothing on the way: not for a curve of two rows either.
    assert not list((tmp_path / "out").rglob("curves.*"))

    scores = tmp_path / "out" / "teapot" / "evaluation" / "scores.jsonl"
    kept = (tmp_path / "out" / "dog" / "summary.json").stat().st_mtime_ns
    before = scores.read_bytes()
    scores.write_bytes(before[:-20])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    again = benchmark(compose(words))
    assert scores.read_bytes() == before
    assert (tmp_path / "out" / "dog" / "summary.json").stat().st_mtime_ns == kept
    assert json.dumps(again.rows) == json.dumps(whole.rows)
    shutil.rmtree(scores.parent)  # with the pictures of the base, of which base_dir has copies
    assert json.dumps(benchmark(compose(words)).rows) == json.dumps(whole.rows)
    assert scores.read_bytes() == before
