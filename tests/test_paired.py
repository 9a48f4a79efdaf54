"""Benchmarks of several settings side by side: hand-made scores in, means and paired differences out."""

import csv
import json
from pathlib import Path

import pytest

from dreambooth.benchmark import paired, results
from dreambooth.metrics.curves import read_curves, write_curves
from dreambooth.metrics.tradeoff import SCORES, Tradeoff


def write_run(folder: Path, dino: list[float], pres: list[float], seconds: float = 10.0) -> None:
    """A finished subject: two subject pictures and two of the class, and one of before, which does not count."""
    rows = [row("after", "subject", n, dino=value) for n, value in enumerate(dino)]
    rows += [row("after", "class", n, pres=value) for n, value in enumerate(pres)]
    rows.append(row("before", "subject", 0, dino=0.9))
    (folder / "evaluation").mkdir(parents=True)
    (folder / "evaluation" / "scores.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    summary = {"seconds": {"train": seconds}, "metrics": {"after": {}}}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "adapter").mkdir()
    (folder / "adapter" / "a.safetensors").write_bytes(bytes(2_000_000))


def row(kind: str, role: str, number: int, **scores: float) -> dict:
    place = {
        "set": kind,
        "file": f"{kind}/{number}.png",
        "role": role,
        "prompt_index": 0 if role == "subject" else 1,
        "picture_index": number,
    }
    return place | dict.fromkeys(SCORES) | scores


@pytest.fixture
def records(tmp_path: Path) -> list[dict]:
    """The prior on and off under two seeds, two subjects each; the last has one picture less."""
    values = {
        ("true", "1", "cat"): ([0.5, 0.7], [0.2, 0.2]),
        ("true", "1", "dog"): ([0.6, 0.6], [0.1, 0.3]),
        ("true", "2", "cat"): ([0.4, 0.4], [0.2, 0.4]),
        ("true", "2", "dog"): ([0.8, 0.6], [0.2, 0.2]),
        ("false", "1", "cat"): ([0.6, 0.8], [0.5, 0.5]),
        ("false", "1", "dog"): ([0.9, 0.7], [0.4, 0.4]),
        ("false", "2", "cat"): ([0.5, 0.7], [0.5, 0.5]),
        ("false", "2", "dog"): ([0.9], [0.3, 0.5]),
    }
    for (prior, seed, subject), scores in values.items():
        write_run(tmp_path / f"{prior}{seed}" / subject, *scores)
    (tmp_path / "true1" / "unfinished").mkdir()
    words = ["task=benchmark", "model.with_prior_preservation={}", "seed={}"]
    pairs = [(prior, seed) for prior in ("true", "false") for seed in ("1", "2")]
    return [
        {"overrides": [words[0], words[1].format(p), words[2].format(s)], "folder": str(tmp_path / f"{p}{s}")}
        for p, s in pairs
    ]


def test_seeds_are_one_setting_and_differences_are_paired(records):
    outcomes = paired.outcomes_of(records)
    assert [each.label for each in outcomes] == ["with_prior_preservation true", "with_prior_preservation false"]
    on, off = paired.compare(outcomes)
    assert (on["units"], off["units"]) == (4, 4)
    assert on["dino"] == pytest.approx((0.6 + 0.6 + 0.4 + 0.7) / 4)
    assert on["pres"] == pytest.approx((0.2 + 0.2 + 0.3 + 0.2) / 4)
    # The second picture of the last unit has no partner: its pair is 0.8 and 0.9.
    assert off["dino_difference"] == pytest.approx((0.1 + 0.2 + 0.2 + 0.1) / 4)
    assert off["pres_difference"] == pytest.approx((0.3 + 0.2 + 0.2 + 0.2) / 4)
    low, high = off["dino_difference_interval"]
    assert 0.1 <= low < off["dino_difference"] < high <= 0.2
    assert on["dino_difference"] is None
    assert on["clip_t"] is None
    assert (on["seconds"], on["megabytes"]) == (10.0, 2.0)


def test_order_of_subjects_and_seeds_does_not_matter(records):
    first = paired.compare(paired.outcomes_of(records))
    again = paired.compare(paired.outcomes_of([records[1], records[0], records[3], records[2]]))
    assert first == again


def test_a_score_of_ones_own_is_in_every_table(records, tmp_path):
    for record in records:
        for run in (path for path in Path(record["folder"]).iterdir() if (path / "summary.json").exists()):
            scores, summary = run / "evaluation" / "scores.jsonl", json.loads((run / "summary.json").read_text())
            rows = [json.loads(line) | {"sharp": 0.25} for line in scores.read_text().splitlines()]
            scores.write_text("".join(json.dumps(row) + "\n" for row in rows))
            summary["metrics"] = {"after": {"dino": 0.5, "sharp": 0.25}, "before": {}, "real": {}}
            (run / "summary.json").write_text(json.dumps(summary))
    assert "| copy | sharp | seconds | MB |" in paired.write(tmp_path, records)
    folder = Path(records[0]["folder"])
    table = results.table({name: folder / name for name in ("cat", "dog")})
    assert "| copy | sharp |" in results.write(folder, table)
    assert "| cat | 0.500 | - | - | - | - | - | 0.250 |" in (folder / "benchmark.md").read_text()
    tradeoff = Tradeoff(0.9)
    for step in (0, 1, 2):
        tradeoff.add(step, {"dino": 0.1 * step, "pres": 0.0, "sharp": 0.25})
    write_curves(folder / "cat" / "curves.csv", tradeoff.rows)
    assert read_curves(folder / "cat" / "curves.csv") == tradeoff.rows
    text = results.write_curves(folder, results.curves({"cat": folder / "cat"}))
    assert text.startswith("| step | subjects | dino | clip_i | clip_t | pres | div | copy | sharp | score |")


def test_the_footer_is_true_of_its_own_means_whatever_the_order_of_the_runs(records, tmp_path):
    """Three pictures of one prompt and one of another, whose own mean counts the prompts."""
    run = tmp_path / "prompts" / "cat"
    write_run(run, [], [])
    rows = [row("after", "subject", n, dino=0.8 if n == 3 else 0.2) | {"prompt_index": n // 3} for n in range(4)]
    (run / "evaluation" / "scores.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    metrics = {"encoders": {"dino": "a ViT"}, "average": "prompts", "after": {"dino": 0.5}}
    (run / "summary.json").write_text(json.dumps({"seconds": {}, "metrics": metrics}))
    text = paired.write(tmp_path, [{"overrides": ["task=benchmark"], "folder": str(tmp_path / "prompts")}])
    assert "| all | 0.350 |" in text
    assert "means count every picture once." in text
    assert "every prompt" not in text


def test_tables_are_written(records, tmp_path):
    text = paired.write(tmp_path, records)
    assert text.startswith("Means over 4 trainings")
    assert "| with_prior_preservation true | 0.575 (" in text
    assert "| less with_prior_preservation true | dino |" in text
    assert "| with_prior_preservation false | +0.150 (+0.100 to +0.200)" in text
    with (tmp_path / "paired.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[1]["dino_difference"]) == pytest.approx(0.15)
    assert json.loads(rows[1]["pres_difference_interval"])[0] == pytest.approx(0.2)
