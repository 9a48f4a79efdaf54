"""The wheel carries conf/ and the pocket weights, and works from another folder without the checkout."""

import configparser
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=kept | environment, capture_output=True, text=True, check=False
    )


def test_the_package_list_is_true():
    on_disk = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "dreambooth").glob("**/*.py")
        if "__pycache__" not in path.parts
    }
    assert set(SETUP["options"]["packages"].split()) == on_disk | {"dreambooth.conf"}


def test_the_pins_are_within_the_ranges():
    requirements = pytest.importorskip("packaging.requirements")
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    extras = " ".join(SETUP["options.extras_require"].values()).split()
    lines = SETUP["options"]["install_requires"].splitlines() + extras
    for line in filter(lambda line: line.strip() and not line.startswith("#"), lines):
        requirement = requirements.Requirement(line.strip())
        name = requirement.name.lower().replace("_", "-")
        assert name in pins, name
        assert requirement.specifier.contains(pins[name]), line
    lightning = next(requirements.Requirement(line) for line in lines if line.startswith("pytorch-lightning"))
    assert not any(lightning.specifier.contains(version) for version in ("2.6.2", "2.6.3"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"  # a copy, since setuptools builds inside the tree
    listed = run("git", "ls-files", cwd=ROOT)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    built = run(*pip, "--wheel-dir", folder, tree, cwd=folder)
    assert built.returncode == 0, built.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The bin/ of a clean environment that holds the wheel and borrows the libraries of this one."""
    environment = tmp_path_factory.mktemp("clean") / "venv"
    assert run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment.parent).returncode == 0
    library = next((environment / "lib").glob("python*")) / "site-packages"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", library)
    done = run(*pip, wheel, cwd=environment.parent)
    assert done.returncode == 0, done.stderr
    (library / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment / "bin"


@pytest.mark.slow
def test_the_wheel_holds_all_cards_and_weights_and_no_generic_names(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    cards = {f"dreambooth/{path.relative_to(ROOT)}" for path in (ROOT / "conf").glob("**/*.yaml")}
    shipped = run("git", "ls-files", "dreambooth/pocket/weights", "dreambooth/pocket/subjects", cwd=ROOT).stdout
    assert cards | set(shipped.splitlines()) <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"dreambooth"}


@pytest.mark.slow
def test_the_installed_command_knows_its_cards_from_another_folder(installed, tmp_path):
    python = installed / "python"
    command = (python, "-c", "from dreambooth.cli import main; main()")
    shown = run(*command, "--help", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "experiment" in shown.stdout
    where = run(python, "-c", "import dreambooth.config as c; print(c.CONF)", cwd=tmp_path).stdout
    assert str(installed.parent) in where
    wrong = run(*command, "model=sd16", cwd=tmp_path)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)


@pytest.mark.exhaustive
def test_the_installed_command_trains_from_another_folder(installed, tmp_path, tiny_sd, photos):
    settings = f"""model.from_pretrained={tiny_sd} model.data.instance_dir={photos} model.data.cached_instance_dir=null
        model.data.resolution=32 model.data.num_reg_images=2 model.data.sampler.inference_steps=2 trainer.max_steps=2
        callbacks.sample_grid.num_images_per_prompt=1 trainer.accelerator=cpu""".split()
    command = (installed / "python", "-c", "from dreambooth.cli import main; main()", *settings)
    result = run(*command, cwd=tmp_path, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    folder = Path(result.stdout.splitlines()[-1])
    assert folder.is_relative_to(tmp_path / "outputs")
    assert {"config.yaml", "metrics.csv", "summary.json", "pipeline", "samples"} <= {p.name for p in folder.iterdir()}


@pytest.mark.exhaustive
def test_the_installed_script_trains_the_shipped_model_from_another_folder(installed, tmp_path):
    (script,) = installed.parent.glob("lib/python*/site-packages/bin/dreambooth")
    few = "trainer.max_steps=2 model.data.num_reg_images=4 model.data.sampler.inference_steps=2 trainer.accelerator=cpu"
    less = "callbacks.evaluate=null callbacks.sample_grid=null callbacks.report=null logger=none".split()
    result = run(installed / "python", script, *few.split(), *less, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    folder = Path(result.stdout.splitlines()[-1])
    assert folder.is_relative_to(tmp_path / "outputs")
    assert str(installed.parent) in (folder / "config.yaml").read_text()  # the photos are those of the wheel
    assert {"metrics.csv", "summary.json", "pipeline"} <= {path.name for path in folder.iterdir()}
