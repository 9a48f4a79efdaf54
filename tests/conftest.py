"""Fixtures shared by all tests, offline and on one thread."""

import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", OMP_NUM_THREADS="1")

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageDraw

from dreambooth.run_folder import FOLDER_VARIABLE
from tests.layouts import write_layout
from tests.tiny import build_tiny_sd

torch.set_num_threads(1)
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """What a test sets in the environment, in the working folder, in logging or in torch's modes ends with it."""
    os.environ.pop(FOLDER_VARIABLE, None)  # of a run that a fixture made for several tests
    before, folder = dict(os.environ), Path.cwd()
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in set(root.handlers) - set(handlers):  # Hydra's writes to what was stderr in that test
        root.removeHandler(handler)
    root.setLevel(level)
    os.chdir(folder)
    if dict(os.environ) != before:
        os.environ.clear()
        os.environ.update(before)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion that predicts the noise. Read only: shared by the session."""
    return build_tiny_sd(tmp_path_factory.mktemp("models") / "tiny_sd")


@pytest.fixture(scope="session")
def tiny_sd_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion that predicts v, with a DDIM scheduler. Read only: shared by the session."""
    return build_tiny_sd(tmp_path_factory.mktemp("models") / "tiny_sd_v", "v_prediction", seed=1, scheduler="DDIM")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of five small pictures: a figure on a gradient, JPEG and PNG, landscape, portrait and square."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate([(48, 40), (40, 48), (40, 40), (64, 36), (36, 64)]):
        ramp = np.linspace(0, 200, width)[None, :, None] * rng.uniform(0.3, 1, 3) + rng.uniform(
            0, 30, (height, width, 3)
        )
        picture = Image.fromarray(ramp.clip(0, 255).astype(np.uint8))
        left, top = rng.integers(2, 12, 2).tolist()
        ImageDraw.Draw(picture).ellipse((left, top, left + 18, top + 20), fill=(240, 60 + 30 * number, 90))
        picture.save(folder / f"{number}.{'jpg' if number % 2 else 'png'}")
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.getuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """A folder as google/dreambooth's, with a live subject and an object."""
    return write_layout(tmp_path / "subjects")
