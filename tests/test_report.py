"""report.html and comparison.html: what is on them, what is left out, and that they are whole."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf
from PIL import Image

from dreambooth import UserError, cli, compose, train
from dreambooth.callbacks.report import Report
from dreambooth.report import charts
from dreambooth.report.comparison import differing
from dreambooth.report.overrides import differences, record
from dreambooth.report.page import report_html, write_report
from dreambooth.report.pictures import Album
from dreambooth.report.read import read_run
from dreambooth.report.scores import verdicts
from dreambooth.report.task import report
from dreambooth.run_folder import open_run
from dreambooth.run_id import run_id
from tests.runs import CLASS, PROMPT, make_run

MOST = 5_000_000  # bytes
VOID = {"meta", "link", "img", "br", "path", "rect", "circle"}


class Page(HTMLParser):
    """What a reader gets of a page: its text, by section too, and its tags with their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags, self.open = "", list[tuple[str, dict[str, str]]](), list[str]()
        self.sections: dict[str, str] = {}
        self.inside: dict[str, int] = {}
        self.section = ""
        self.feed(html)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attrs)["id"]
        if self.section:
            self.inside[self.section] = self.inside.get(self.section, 0) + 1

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "section":
            self.section = ""

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("style", "script"):
            return
        self.text += data
        if self.section:
            self.sections[self.section] = self.sections.get(self.section, "") + data

    def all(self, tag: str, attribute: str) -> list[str]:
        return [attributes[attribute] for name, attributes in self.tags if name == tag and attribute in attributes]


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with every part."""
    return make_run(tmp_path / "run")


def test_the_page_says_the_order_of_averaging(run: Path) -> None:
    path = run / "summary.json"
    for average, said in (("pictures", "count every picture once"), ("prompts", "count every prompt (the mean of")):
        summary = json.loads(path.read_text())
        summary["metrics"] |= {"average": average, "encoders": {"dino": "a ViT"}}
        path.write_text(json.dumps(summary))
        assert said in page_of(run).text


def test_every_prompt_of_the_class_is_shown(run: Path) -> None:
    scores = run / "evaluation" / "scores.jsonl"
    rows = [json.loads(line) for line in scores.read_text().splitlines()]
    for row in rows:
        if row["role"] == "class" and row["picture_index"] == 2:
            row["prompt"] = "a photo of a teapot"
    scores.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = page_of(run)
    assert f"“{CLASS}”" in page.sections["class"]
    assert "“a photo of a teapot”" in page.sections["class"]


def test_everything_is_on_one_page_that_needs_nothing_else(run: Path) -> None:
    page = page_of(run)
    expected = "glance pictures class photos nearest curves scores cost settings versions".split()
    assert list(page.sections) == expected
    assert [href[1:] for href in page.all("a", "href") if href != "#main"] == expected
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {*page.all("section", "aria-labelledby"), "main"} <= set(ids)
    outside = [link for link in page.all("link", "href") if not link.startswith("data:")]
    html = (run / "report.html").read_text()
    assert not outside
    assert all(src.startswith("data:image/webp;base64,") for src in page.all("img", "src"))
    assert "@import" not in html
    assert html.count("url(") == html.count("url(#clip-") == len(page.all("svg", "viewbox")) == 4
    assert "script" not in {tag for tag, _ in page.tags}
    assert all(page.all("img", "alt"))
    assert len(page.all("img", "alt")) == len(page.all("img", "src"))
    assert [tag for tag, _ in page.tags if tag in ("h1", "main", "header", "nav", "footer")] == [
        "header", "h1", "nav", "main", "footer",
    ]  # fmt: skip
    assert len(html) < MOST


def test_it_says_what_came_of_the_run(run: Path) -> None:
    page = page_of(run)
    glance = " ".join(page.sections["glance"].split())
    assert f"“{PROMPT}”" in page.text
    for words in ("0.70", "Learned", "75 % of the way", "Class kept", "4 % of the way", "No copies", "before 0.40"):
        assert words in glance.replace("\N{NARROW NO-BREAK SPACE}", " "), words
    assert "0.679\N{NO-BREAK SPACE}to 0.721" in page.sections["scores"]
    assert "a ViT" in page.sections["scores"]
    assert all(words in page.sections["cost"] for words in ("2 min 10 s", "1.5 GiB"))
    settings = page.sections["settings"]
    assert settings.index("0.0002") < settings.index("The full configuration") < settings.index("from_pretrained")
    assert "dreambooth model.optim.lr=0.0002" in page.sections["versions"]
    assert "2.15.0" in page.sections["versions"]
    assert "Step 40 had the best" in page.text
    assert page.sections["nearest"].index("0.73") < page.sections["nearest"].index("0.72")  # the most alike first


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost", "sections", "words"),
    [
        (["evaluation"], ["class", "nearest"], "Before training"),
        (["evaluation", "samples"], ["pictures", "class", "nearest"], ""),
        (["curves.csv", "metrics.csv"], ["curves"], ""),
        (["summary.json"], ["scores", "cost"], "60 steps, not finished"),
        (["overrides.yaml"], [], "The full configuration"),
        (["../photos run"], ["photos", "nearest"], "no longer in"),
        (["evaluation/before"], [], "Before and after"),
        ("evaluation samples summary.json metrics.csv curves.csv overrides.yaml pipeline".split(),
         "glance pictures class nearest scores cost curves versions".split(), "No scores: this run was not evaluated"),
    ],
)  # fmt: skip
def test_what_is_missing_is_left_out(run: Path, lost: list[str], sections: list[str], words: str) -> None:
    whole = set(page_of(run).sections)
    for name in lost:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = page_of(run)
    assert whole - set(page.sections) == set(sections)
    assert {href[1:] for href in page.all("a", "href")} - {"main"} == set(page.sections)
    assert words in page.text
    assert min(page.inside.values()) > 3  # more than a heading


def test_what_a_user_typed_is_text(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script> & \"'<img src=x onerror=alert(1)>"
    run = make_run(tmp_path / "a <b>run</b>", prompt=bad)
    page = page_of(run)
    assert "script" not in {tag for tag, _ in page.tags}
    assert all(src.startswith("data:") for src in page.all("img", "src"))
    assert f"“{bad}”" in page.text
    assert not [attributes for _, attributes in page.tags if "onerror" in attributes]
    other = make_run(tmp_path / "b", prompt=bad)
    path = report(compose(["task=report", f"report.runs=['{run}','{other}']", f"report.out_path={tmp_path}"]))
    assert path is not None
    assert [attributes for tag, attributes in Page(path.read_text()).tags if tag == "script"] == [{}]


@pytest.mark.slow
def test_large_pictures_stay_below_the_limit(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", side=512, photo_side=2000)
    assert write_report(run).stat().st_size < MOST
    album = Album(budget=20_000)
    shots = [album.add(run / f"evaluation/after/{number:05d}.png", "") for number in range(6)]
    album.develop()
    assert sum(len(shot.src) for shot in shots if shot) < 30_000  # the smallest there is
    noise = np.random.default_rng(0).integers(0, 256, (20, 128, 128, 3), dtype=np.uint8)
    album = Album(budget=400_000)
    for number, pixels in enumerate(noise):  # enlarged pixel by pixel, but not at any price
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        album.add(tmp_path / f"{number}.png", "")
    album.develop()
    assert sum(len(shot.src) for shot in album.shots) < 400_000
    (run / "broken.png").write_bytes(b"no picture")
    assert album.add(run / "broken.png", "") is None
    assert album.add(run / "missing.png", "") is None


def test_with_one_photo_nothing_is_promised(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    summary["metrics"]["real"] = dict.fromkeys(summary["metrics"]["real"])
    del summary["metrics"]["intervals"]
    (run / "summary.json").write_text(json.dumps(summary))
    likeness, prompts, drift, copying = verdicts(read_run(run))
    assert (likeness.grade, likeness.word, drift.word, copying.word) == ("", "", "", "")
    assert "rose by 0.300. Higher is better." in likeness.sentence
    assert (prompts.score.title, prompts.grade) == ("Prompt fidelity", "")
    assert "rose by 0.300" in page_of(run).text


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ({"dino": 0.61, "pres": 0.3, "copy": 0.88}, ["Partly learned", "", "Class kept", "Close to photos"]),
        ({"dino": 0.45, "pres": 0.5, "copy": 0.95}, ["Hardly learned", "", "Some drift", "Copies photos"]),
        ({"dino": 0.95, "pres": 0.7, "copy": 0.2}, ["Learned", "", "Class lost", "No copies"]),
    ],
)
def test_the_headline_is_not_only_praise(run: Path, after: dict, words: list[str]) -> None:
    summary = json.loads((run / "summary.json").read_text())
    summary["metrics"]["after"] |= after
    (run / "summary.json").write_text(json.dumps(summary))
    assert [verdict.word for verdict in verdicts(read_run(run))] == words


@pytest.mark.slow
def test_several_runs_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [make_run(tmp_path / "outputs" / name, lr=lr) for name, lr in (("a", 1e-4), ("b & c", 2e-4), ("d", 1.5e-4))]
    (tmp_path / "outputs" / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    path = report(compose(["task=report", "report.runs=outputs/*"]))
    assert path == tmp_path / "comparison.html"
    page = Page(path.read_text())
    hrefs = [href for href in page.all("a", "href") if href != "#main"]
    assert hrefs == ["outputs/a/report.html", "outputs/b%20%26%20c/report.html", "outputs/d/report.html"]
    assert all((run / "report.html").exists() for run in runs)
    assert "they differ in lr" in page.text
    assert page.text.count("★") == 2  # in the sentence above the table, and beside the likeness of b
    assert page.text.index("b & c") < page.text.index("0.700 ★") < page.text.index("0.650")
    assert len(page.all("svg", "viewbox")) == 1
    assert len(page.all("img", "src")) == 6 + 3 * 4  # beside the runs, and for each prompt before and of each run
    assert f"“{PROMPT}”, the same seed" in page.text
    assert path.stat().st_size < MOST
    for run in runs[:2]:
        for name in ("overrides.yaml", "curves.csv"):
            (run / name).unlink()
    shutil.rmtree(runs[0] / "evaluation")
    listed = f"report.runs=[{runs[0]},{runs[2]}]"
    path = report(compose(["task=report", listed, "report.out_path=pages/runs.html"]))
    assert path == tmp_path / "pages" / "runs.html"
    page = Page(path.read_text())
    assert "../outputs/a/report.html" in page.all("a", "href")
    assert "instance_dir" in page.text  # an old run does not know what somebody changed


def test_runs_of_other_cards_differ_in_the_card(tmp_path: Path) -> None:
    """Not in every key that one of the cards has and the other lacks."""
    runs = [make_run(tmp_path / name) for name in "abc"]
    cards = ({"_target_": "a.Full"}, {"_target_": "a.Lora", "rank": 16}, {"_target_": "a.Lora", "rank": 32})
    for run, card in zip(runs, cards, strict=True):
        config = OmegaConf.load(run / "config.yaml")
        config.model.tuning = card
        OmegaConf.save(config, run / "config.yaml")
        (run / "overrides.yaml").unlink(missing_ok=True)
    tuning = [
        [key for key in differing([read_run(run) for run in pair]) if "tuning" in key] for pair in (runs[:2], runs[1:])
    ]
    assert tuning == [["model.tuning._target_"], ["model.tuning.rank"]]


def test_one_run_goes_where_it_is_asked_to(run: Path, tmp_path: Path) -> None:
    assert report(compose(["task=report", f"report.runs={run}"])) == run / "report.html"
    there = report(compose(["task=report", f"report.runs=[{run}]", f"report.out_path={tmp_path / 'x'}"]))
    assert there == tmp_path / "x" / "report.html"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("summary.json", '{"steps": 3,\n', "summary.json, line 2, is not JSON"),
        ("summary.json", "[1]", "summary.json is no summary of a run"),
        ("summary.json", '{"metrics": {"after": 3}}', "summary.json is no summary of a run"),
        ("evaluation/scores.jsonl", '{"set": "after", "file": "x"}\n{"set\n', "scores.jsonl, line 2, is not JSON"),
        ("evaluation/scores.jsonl", "{}\n", "without set and file"),
        ("metrics.csv", "step,loss\n1,0.5\n2\n", "metrics.csv, line 3, has 1 values for 2 columns"),
        ("metrics.csv", "step,loss\n1,abc\n", "metrics.csv, line 2: 'abc' is no number"),
        ("curves.csv", "step,dino\n1,x\n", "curves.csv, line 2"),
        ("config.yaml", "a: [", "config.yaml cannot be read"),
        ("config.yaml", "3", "config.yaml does not hold settings"),
        ("overrides.yaml", "changed: 3", "overrides.yaml does not hold settings"),
    ],
)
def test_a_broken_part_is_one_line(run: Path, name: str, text: str, words: str) -> None:
    (run / name).write_text(text)
    with pytest.raises(UserError) as caught:
        report(compose(["task=report", f"report.runs={run}"]))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ("outputs/runn", "did you mean 'run'?"),
        ("nowhere/at/all", "there is no such folder"),
        ("'nowhere/*'", "no run folder is called so"),
        ("outputs", "holds no config.yaml"),
        ("[]", "report.runs is empty"),
        ("[outputs/run,outputs/runn]", "report.runs=outputs/runn"),
    ],
)
def test_what_is_no_run_is_one_line_and_exit_code_2(runs, words, tmp_path, monkeypatch, capsys) -> None:
    make_run(tmp_path / "outputs" / "run")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["dreambooth", "task=report", f"report.runs={runs}"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    line = capsys.readouterr().err
    assert (caught.value.code, line.count("\n")) == (2, 1), line
    assert words in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_the_command_and_what_is_not_the_default_are_recorded(tmp_path: Path) -> None:
    typed = ["model.optim.lr=2e-4", 'model.data.instance_prompt="a zwx, it\'s a dog"', "callbacks.sample_grid=null"]
    cfg = compose([*typed, f"hydra.run.dir={tmp_path}", "+trainer.deterministic=true", "resume=false"])
    record(cfg, tmp_path)
    found = yaml.safe_load((tmp_path / "overrides.yaml").read_text())
    quoted = shlex.quote(typed[1])
    assert found["command"].startswith(f"dreambooth model.optim.lr=2e-4 {quoted} callbacks.sample_grid=null ")
    assert found["command"].endswith(f" resume=false hydra.run.dir={tmp_path}")
    assert found["changed"].keys() == {
        "model.optim.lr", "model.data.instance_prompt", "callbacks.sample_grid", "trainer.deterministic",
    }  # fmt: skip
    assert found["changed"]["model.optim.lr"] == [1e-4, 2e-4]
    assert found["changed"]["trainer.deterministic"] == ["(absent)", True]
    assert found["changed"]["callbacks.sample_grid"][0]["num_images_per_prompt"] == 2
    assert differences(compose(), compose()) == {}
    cards = differences(compose(), compose(["model/weighting=min_snr"]))
    assert cards.keys() == {"model.weighting._target_", "model.weighting.gamma"} or "model.weighting.gamma" in cards


def test_the_report_is_no_part_of_the_run(tmp_path: Path) -> None:
    assert run_id("task=report,report.runs=[a,b],callbacks.report=null,report=default") == run_id("")
    cfg = compose([f"hydra.run.dir={tmp_path / 'run'}"])
    open_run(cfg, tmp_path / "run")
    record(cfg, tmp_path / "run")
    other = compose([f"hydra.run.dir={tmp_path / 'run'}", "seed=2"])
    assert open_run(other, tmp_path / "run").summary is None  # the first one never began


@pytest.mark.slow
def test_a_training_ends_with_its_report(tiny_sd, photos, tmp_path, monkeypatch, caplog) -> None:
    settings = f"""model.from_pretrained={tiny_sd} model.data.instance_dir={photos} model.data.cached_instance_dir=null
        model.data.resolution=32 model.data.num_reg_images=2 model.data.sampler.inference_steps=2
        model.data.regularization_dir={tmp_path / "class"} callbacks.sample_grid.num_images_per_prompt=1
        trainer.accelerator=cpu callbacks.evaluate=null hydra.run.dir={tmp_path / "run"}""".split()
    prompts = "callbacks.sample_grid.prompts=[a photo of a sks dog]"
    result = train(compose([*settings, prompts, "trainer.max_steps=3"]))
    page = Page((result.folder / "report.html").read_text())
    assert {"photos", "curves", "cost", "settings", "versions", "pictures"} <= set(page.sections)
    assert "3 steps" in page.text
    assert f"hydra.run.dir={tmp_path / 'run'}" in page.sections["versions"]
    read = read_run(result.folder)
    assert read.changed is not None
    assert read.changed["trainer.max_steps"] == [compose().trainer.max_steps, 3]
    assert read.steps["step"] == [1.0, 2.0, 3.0]
    monkeypatch.setattr("dreambooth.callbacks.report.write_report", lambda folder: 1 / 0)
    more = train(compose([*settings, prompts, "trainer.max_steps=4"]))
    assert (more.folder, more.summary["steps"]) == (result.folder, 4)
    assert "no report.html (division by zero): task=report report.runs=" in caplog.text
    assert isinstance(Report(), Report)


@pytest.mark.exhaustive
def test_a_sweep_ends_with_a_comparison(tiny_sd, photos, tmp_path) -> None:
    settings = f"""model.from_pretrained={tiny_sd} model.data.instance_dir={photos} model.data.cached_instance_dir=null
        model.data.resolution=32 model.with_prior_preservation=false callbacks.sample_grid=null trainer.max_steps=2
        trainer.accelerator=cpu callbacks.evaluate=null model.optim.lr=1e-4,2e-4""".split()
    launch = [sys.executable, str(Path(__file__).parents[1] / "launch.py")]
    for arguments in (["--multirun", *settings], ["task=report", "report.runs=outputs/dreambooth/*"]):
        done = subprocess.run([*launch, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    commands = [yaml.safe_load(path.read_text())["command"] for path in tmp_path.glob("outputs/*/*/overrides.yaml")]
    assert {command.rpartition(" ")[2] for command in commands} == {"model.optim.lr=0.0001", "model.optim.lr=0.0002"}
    assert all(command.startswith("dreambooth model.from_pretrained=") for command in commands)
    page = Page((tmp_path / "comparison.html").read_text())
    assert "they differ in lr" in page.text
    assert "Loss over the steps" in page.text


@pytest.mark.slow
def test_a_page_needs_no_training_library() -> None:
    code = (
        "import sys, dreambooth.report.task; print({'diffusers', 'transformers', 'pytorch_lightning'} & {*sys.modules})"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "set()"


def test_charts_keep_gaps_and_round_numbers() -> None:
    assert [text for _, text in charts.ticks(0.02, 0.31, 4)] == ["0.1", "0.2", "0.3"]
    assert [text for _, text in charts.ticks(0, 1000, 5)] == ["0", "200", "400", "600", "800", "1000"]
    assert [text for _, text in charts.ticks(-0.5, 0.5, 4)] == ["−0.5", "0.0", "0.5"]
    assert [text for _, text in charts.ticks(1, 2, 5, least=1)] == ["1", "2"]
    assert charts.smooth([1.0, None, 3.0, float("nan"), 5.0], 1) == [1.0, None, 3.0, None, 5.0]
    assert charts.smooth([2.0] * 100) == pytest.approx([2.0] * 100)
    x, y = charts.thinned(list(range(100_000)), [1.0] * 100_000)
    assert len(x) == len(y) == charts.MOST_POINTS
    gap = charts.chart("k", "t", [charts.Line("l", "one", [0, 1, 2, 3], [1, None, 2, 3])])
    assert gap is not None
    assert gap.curves[0].path.count("M") == 2
    assert charts.chart("k", "t", [charts.Line("l", "one", [0], [1.0])]) is None
    assert charts.chart("k", "t", [charts.Line("l", "one", [0, 1], [0.0, 0.0])]) is not None


def test_the_page_of_an_interrupted_run_says_so(run: Path) -> None:
    (run / "summary.json").unlink()
    rows = (run / "metrics.csv").read_text().splitlines()
    (run / "metrics.csv").write_text("\n".join(rows[:21]) + "\n")
    assert "20 of 60 steps, not finished" in report_html(read_run(run))
