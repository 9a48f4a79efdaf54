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


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands() -> list[list[str]]:
    pages = README + (ROOT / "docs" / "data.md").read_text()
    lines = "".join(blocks("bash", pages)).replace("\\\n", " ").splitlines()
    typed = [shlex.split(line, comments=True) for line in lines if "launch.py" in line]
    return [sweepless(command) if "-m" in command else command for command in typed]


def sweepless(command: list[str]) -> list[str]:
    """The first job of a sweep."""
    return [word.partition(",")[0] for word in command if word != "-m"]


def test_every_command_composes():
    assert len(commands()) > 8
    for command in commands():
        arguments = command[command.index("launch.py") + 1 :]
        assert arguments == ["--help"] or config.compose(arguments)


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
