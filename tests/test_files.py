"""Pictures of any kind are read or named; writes are whole or absent."""

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dreambooth.errors import UserError
from dreambooth.files import atomic, content_key, list_pictures, open_picture, opened, sweep

KEY = "model.data.instance_dir"


def test_a_photo_of_200_megapixels_is_no_attack(tmp_path: Path) -> None:
    Image.new("1", (16320, 12240)).save(tmp_path / "large.png")
    usual = Image.MAX_IMAGE_PIXELS
    with opened(tmp_path / "large.png") as file:
        assert file.size == (16320, 12240)
    assert usual == Image.MAX_IMAGE_PIXELS
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "large.png")


def test_sorted_verified_and_others_reported_once(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    (photos / ".DS_Store").write_bytes(b"x")
    (photos / "deep.png").mkdir()
    (photos / "notes.txt").write_text("a dog")
    (photos / "Z.PNG").write_bytes((photos / "0.png").read_bytes())
    with caplog.at_level(logging.INFO):
        names = [path.name for path in list_pictures(photos, KEY)]
        assert names == [path.name for path in list_pictures(photos, KEY)]
    assert names == ["0.png", "1.jpg", "2.png", "3.jpg", "4.png", "Z.PNG"]
    assert [r.getMessage() for r in caplog.records] == [f"{photos}: not pictures, ignored: notes.txt"]


def test_all_unreadable_pictures_in_one_line(photos: Path) -> None:
    (photos / "empty.jpg").touch()
    (photos / "text.png").write_text("this is not a picture")
    for name in ("1.jpg", "2.png"):
        whole = (photos / name).read_bytes()
        (photos / f"cut{name}").write_bytes(whole[: len(whole) // 2])
    (photos / "gone.jpg").symlink_to(photos / "nowhere.jpg")
    with pytest.raises(UserError) as error:
        list_pictures(photos, KEY)
    message = str(error.value)
    assert message.startswith(f"{KEY}: 5 of 10 pictures")
    assert "\n" not in message
    for name in ("empty.jpg (0 bytes)", "text.png (not a picture", "cut1.jpg (", "cut2.png (", "gone.jpg ("):
        assert name in message


def test_a_repaired_picture_is_read_again(photos: Path) -> None:
    whole = (photos / "0.png").read_bytes()
    (photos / "0.png").write_bytes(whole[:60])
    with pytest.raises(UserError, match=r"1 of 5 pictures cannot.*0\.png"):
        list_pictures(photos, KEY)
    (photos / "0.png").write_bytes(whole)
    assert len(list_pictures(photos, KEY)) == 5


def test_missing_and_empty_folders_name_the_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{KEY}: cannot open {tmp_path}/no "):
        list_pictures(tmp_path / "no", KEY)
    with pytest.raises(UserError, match=f"{KEY}: there is no picture in {tmp_path}"):
        list_pictures(tmp_path, KEY)


def saved(image: Image.Image, name: str, folder: Path, **options: object) -> tuple[int, int, int]:
    """The upper left pixel of an image after a trip through a file."""
    image.save(folder / name, **options)
    pixel = open_picture(folder / name).getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return pixel


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    orange = Image.new("RGB", (4, 4), (200, 100, 0))
    assert saved(Image.fromarray(np.full((4, 4), 32768, np.uint16)), "16.png", tmp_path) == (128, 128, 128)
    assert saved(Image.new("L", (4, 4), 77), "L.png", tmp_path) == (77, 77, 77)
    assert saved(Image.new("1", (4, 4), 1), "1.png", tmp_path) == (255, 255, 255)
    assert saved(Image.new("LA", (4, 4), (0, 0)), "LA.png", tmp_path) == (255, 255, 255)
    assert saved(Image.new("RGBA", (4, 4), (255, 0, 0, 128)), "RGBA.png", tmp_path) == (255, 127, 127)
    assert saved(orange.quantize(4), "P.png", tmp_path) == (200, 100, 0)
    assert saved(orange.quantize(4), "Pt.png", tmp_path, transparency=0) == (255, 255, 255)
    assert saved(orange, "t.png", tmp_path, transparency=(200, 100, 0)) == (255, 255, 255)
    assert np.allclose(saved(orange.convert("CMYK"), "c.jpg", tmp_path), (200, 100, 0), atol=4)
    assert saved(Image.fromarray(np.full((4, 4), 32768, np.uint16)), "16.tiff", tmp_path) == (128, 128, 128)
    for mode, value in (("F", 0.5), ("I", 200)):  # a white of 1, of 255, of 65,535, ...?
        with pytest.raises(ValueError, match="32-bit pixels have no agreed range"):
            saved(Image.new(mode, (4, 4), value), f"{mode}.tiff", tmp_path)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 4), "black")
    image.paste((255, 255, 255), (0, 0, 3, 4))  # the left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held turned by 90 degrees
    assert saved(image, "e.png", tmp_path, exif=exif) == (255, 255, 255)
    upright = open_picture(tmp_path / "e.png")
    assert upright.size == (4, 6)
    assert upright.getpixel((3, 0)) == (255, 255, 255)
    assert upright.getpixel((0, 5)) == (0, 0, 0)


def test_what_is_written_is_for_whom_any_file_is(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    with atomic(tmp_path / "folder") as path:
        path.mkdir()
        save_file({"a": torch.zeros(2)}, path / "a.safetensors")
    with atomic(tmp_path / "b.safetensors") as path:
        save_file({"b": torch.zeros(2)}, path)
    modes = {name: (tmp_path / name).stat().st_mode for name in ("any", "folder/a.safetensors", "b.safetensors")}
    assert len(set(modes.values())) == 1, modes


def test_atomic_is_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.txt"
    with atomic(target) as path:
        path.write_text("one")
        assert not target.exists()
        assert path.parent == target.parent
        assert path.name.startswith(".")
    with pytest.raises(ZeroDivisionError), atomic(target) as path:
        path.write_text(f"two {1 / 0}")
    assert target.read_text() == "one"
    assert os.listdir(target.parent) == ["a.txt"]
    for number in range(2):
        with atomic(tmp_path / "folder") as path:
            path.mkdir()
            (path / str(number)).touch()
    assert os.listdir(tmp_path / "folder") == ["1"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/file/a.txt"), atomic(tmp_path / "file" / "a.txt"):
        pass


def test_a_full_disk_is_one_line_and_leaves_nothing(small_disk: Path) -> None:
    buffer = io.BytesIO()
    torch.save(torch.zeros(100_000), buffer)
    with (
        pytest.raises(UserError, match=f"cannot write {small_disk}/a.pt: No space left"),
        atomic(small_disk / "a.pt") as path,
    ):
        path.write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match=f"cannot write {small_disk}/b.pt: "), atomic(small_disk / "b.pt") as path:
        torch.save(torch.zeros(100_000), path)
    assert os.listdir(small_disk) == []


def test_a_file_never_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    """A path that was typed for a table would cost all that is in it."""
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "kept").touch()
    with (
        pytest.raises(UserError, match=r"cannot write .*outputs: Is a directory"),
        atomic(tmp_path / "outputs") as path,
    ):
        path.touch()
    assert os.listdir(tmp_path / "outputs") == ["kept"]


@pytest.mark.slow
def test_sweep_takes_what_dead_processes_left(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from dreambooth.files import atomic\n"
        f"with atomic(Path({str(tmp_path)!r}, 'a.pt')) as path: path.touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".a.pt.")
    with atomic(tmp_path / "b.pt") as path:
        path.touch()
        sweep(tmp_path)
        assert path.exists()
    assert os.listdir(tmp_path) == ["b.pt"]


def test_content_key_tells_parts_apart() -> None:
    keys = [content_key(*parts) for parts in [(1, 2), (12,), ("1", 2), (2, 1), ((1, 2),), (1, 2, None)]]
    assert len(set(keys)) == len(keys)
    assert content_key(1, 2) == keys[0]
