"""What the README says can be typed can be typed."""

import re
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dreambooth import config
from dreambooth.run_folder import flatten

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SHELL = {">", ">>", "<", "|", "&&", ";"}


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands() -> dict[str, list[str]]:
    """What is typed after the program's name on every page, by page and line; not what a shell would fill in."""
    found = {}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for line in "".join(blocks("bash", page.read_text())).replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            name = "launch.py" if "launch.py" in words else "dreambooth"
            ours = name == "launch.py" or words[:1] == [name]
            if ours and not SHELL & set(words) and "$" not in line:
                command = words[words.index(name) + 1 :]
                found[f"{page.name}: {' '.join(command)}"] = sweepless(command) if "-m" in command else command
    return found


def sweepless(command: list[str]) -> list[str]:
    """The first job of a sweep."""
    return [word.partition(",")[0] for word in command if word != "-m"]


@pytest.mark.slow
@pytest.mark.parametrize("command", commands().values(), ids=[name[:90] for name in commands()])
def test_every_command_composes(command):
    assert command == ["--help"] or config.compose(command)


def test_every_page_with_commands_is_read():
    pages = {name.partition(":")[0] for name in commands()}
    assert pages >= {"README.md", "data.md", "evaluation.md", "scale.md", "webdataset.md"}


def test_every_target_of_make_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", README)) - {"a"} <= targets


def test_every_key_and_card_of_the_tables_exists():
    trees = [config.compose(["model/weighting=min_snr", f"model/tuning={name}"]) for name in ("lora", "pivotal")]
    ours = [row.split("|")[4] for row in README.splitlines() if row.startswith("| ") and row.count("|") == 5]
    keys = {key for cell in ours for key in re.findall(r"`([a-z_]+\.[a-z_.]+[a-z])", cell)} - {"hydra.run.dir"}
    assert len(keys) > 30
    known = {key for tree in trees for key in flatten(OmegaConf.to_container(tree, resolve=False))}
    nodes = {key.rpartition(".")[0] for key in known}
    assert keys - known - nodes == set()


def test_every_file_that_the_architecture_names_exists():
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.(?:py|yaml)|conf/[a-z/]+)`", page))
    assert len(named) > 20
    assert [name for name in named if not any((ROOT / top / name).exists() for top in ("", "dreambooth"))] == []


def test_the_test_command_is_that_of_make_and_of_ci():
    assert "python -m pytest\n" in "".join(blocks("bash"))
    assert "\n\t$(BIN)/python -m pytest\n" in (ROOT / "Makefile").read_text()
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith('python -m pytest "$@"')


@pytest.mark.slow
def test_the_python_door(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    quick = (
        '"trainer.max_steps=2", "model.data.num_reg_images=2", "callbacks.sample_grid=null", "callbacks.evaluate=null"'
    )
    code = code.replace('"trainer.max_steps=20"', quick)
    code = code.replace('"infer.prompts', '"infer.inference_steps=2", "infer.prompts')
    names: dict = {}
    exec(code, names)
    assert str(names["run"].folder) in capsys.readouterr().out
    assert names["run"].summary["steps"] == 2
    assert all(path.exists() for path in names["pictures"])
