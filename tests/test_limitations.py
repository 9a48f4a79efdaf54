"""benchmarks/rarity.py and benchmarks/limitations.py: what a base rarely saw, and what is counted in finished runs."""

import csv
import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from benchmarks import limitations
from benchmarks.rarity import RARER, SEEN, UNSEEN, obeyed, places, rarity, seen, train
from dreambooth import compose
from dreambooth.families.sd import StableDiffusion
from dreambooth.noise import seed_of
from dreambooth.pocket import encoders, ready
from dreambooth.pocket.backgrounds import CONTEXTS
from dreambooth.pocket.scenes import NOUNS, PLACES, Scenes
from dreambooth.pocket.world import Odds, draw, place


def test_every_class_has_one_place_of_each_rarity_and_no_place_is_rarer_by_itself() -> None:
    for noun in NOUNS:
        assert sorted(rarity(noun, name) for name in UNSEEN) == sorted(RARER)
        assert all(rarity(noun, name) == 1 for name in set(PLACES) - set(UNSEEN))
        assert [rarity(noun, name, "place") for name in UNSEEN] == [64, 8, 1]  # of all classes alike
    subjects = compose(["experiment=rarity"]).benchmark.subjects
    for name in UNSEEN:  # of what is trained on it, each place has each rarity as often
        levels = [rarity(ready.SUBJECTS[subject].noun, name) for subject in subjects]
        assert {levels.count(level) for level in RARER} == {len(subjects) // len(RARER)}


def test_scenes_are_as_rare_as_they_should_be() -> None:
    scenes = Scenes(20000, "rare", odds=Odds(places=places))
    counts = seen(scenes)
    assert sum(sum(row.values()) for row in counts.values()) == 20000
    for noun, row in counts.items():
        usual = sum(row[name] for name in PLACES if rarity(noun, name) == 1) / 4
        for name in UNSEEN:
            assert row[name] == pytest.approx(usual / rarity(noun, name), rel=0.25, abs=8)
    alike = [scene.figure for scene in scenes.scenes[:50]]
    assert alike == [scene.figure for scene in Scenes(50, "rare").scenes]  # the figures are those of even places


@pytest.mark.exhaustive
def test_the_base_is_a_model_like_any_other(tmp_path: Path) -> None:
    base = train(tmp_path, count=24, steps=2, seed=0)
    assert StableDiffusion(str(base)).default_resolution == 64
    assert json.loads((base / SEEN).read_text())["dog"].keys() == set(PLACES)
    assert obeyed(base, 1).keys() == set(RARER)


def run_of(folder: Path, subject: str, wrong: set[str]) -> Path:
    """A finished subject whose pictures are drawings of the world, on the grass where they should be in ``wrong``."""
    run, rows = folder / subject, []
    (run / "evaluation").mkdir(parents=True)
    for when in ("before", "after"):
        for number, (name, words) in enumerate(CONTEXTS.items()):
            where = "grass" if when == "after" and name in wrong else name
            file = f"{when}-{number}.png"
            draw(place(ready.SUBJECTS[subject], where, seed_of(subject, when, name))).save(run / "evaluation" / file)
            prompt = f"a sks {ready.SUBJECTS[subject].noun} {words}"
            rows.append({"set": when, "role": "subject", "prompt": prompt, "file": file, "dino": 0.5})
    rows.append({"set": "after", "role": "class", "prompt": "a photo of a dog at night", "file": "none"})
    (run / "evaluation" / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "summary.json").write_text("{}")
    OmegaConf.save({"model": {"from_pretrained": str(folder / "base")}}, run / "config.yaml")
    return run


def test_places_are_counted_by_how_often_the_base_saw_them(tmp_path: Path) -> None:
    rarest = {name: [each for each in UNSEEN if rarity(name, each) == 64] for name in ("dog", "cat")}
    runs = [run_of(tmp_path, "dog", set(rarest["dog"])), run_of(tmp_path, "cat", set())]
    referee = encoders.load_judge()
    records = [record for run in runs for record in limitations.look(run, referee)]
    assert len(records) == 2 * 2 * len(CONTEXTS)
    counts = {noun: {name: 640 // rarity(noun, name) for name in PLACES} for noun in NOUNS}
    lines = limitations.rarity_table(limitations.by_rarity(records, counts)).splitlines()[2:]
    assert lines[0] == "| 1 | 640 to 640 | 2 | 1.00 | 1.00 |  |"
    assert lines[1] == "| 1/8 | 80 to 80 | 2 | 1.00 | 1.00 | +0.00 (+0.00 to +0.00) |"
    assert lines[2] == "| 1/64 | 10 to 10 | 2 | 1.00 | 0.50 | -0.50 (-1.00 to +0.00) |"
    by_place = limitations.table(limitations.by_place(records)).splitlines()[2:]
    wrong = next(line for line in by_place if line.startswith(f"| {rarest['dog'][0]} "))
    assert " 1.00 | 0.50 |" in wrong


def test_the_command_asks_the_base_for_what_it_saw_and_writes_tables(tmp_path: Path, monkeypatch, capsys) -> None:
    folders = [tmp_path / "seed1", tmp_path / "seed2"]
    for folder, subject in zip(folders, ("dog", "cat"), strict=True):
        run_of(folder, subject, set())
    monkeypatch.setattr("sys.argv", ["limitations", *map(str, folders)])
    limitations.main()
    out = capsys.readouterr().out
    assert "| seen |" not in out
    assert out == (tmp_path / "limitations.md").read_text() + f"{tmp_path / 'limitations.md'}\n"
    assert "Counted in seed1/dog, seed2/cat." in out
    with (tmp_path / "limitations.csv").open(newline="") as file:
        rows = {row["place"]: row for row in csv.DictReader(file)}
    assert rows.keys() == CONTEXTS.keys()
    night = rows["night"]
    assert [night[name] for name in ("photos", "pictures", "right_before", "right")] == ["no", "2", "1.0", "1.0"]
    assert night["dino"] == "0.5"
    assert not (tmp_path / "limitations_rarity.csv").exists()
    (folders[0] / "base").mkdir()
    (folders[0] / "base" / SEEN).write_text(json.dumps({noun: dict.fromkeys(PLACES, 3) for noun in NOUNS}))
    limitations.main()
    out = capsys.readouterr().out
    assert "| 1 | 3 to 3 | 6 | 1.00 | 1.00 |" in out  # none is rarer
    assert "1/8" not in out
    with (tmp_path / "limitations_rarity.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert [row[name] for name in ("times_less_seen", "scenes_low", "right", "less")] == ["1", "3", "1.0", ""]
    monkeypatch.setattr("sys.argv", ["limitations", str(folders[1])])
    limitations.main()  # of one run, in it
    assert capsys.readouterr().out.splitlines()[-1] == str(folders[1] / "limitations.md")
