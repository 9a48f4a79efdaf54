"""Cached entries are named by what makes them, made once, and made again when they are not what they should be."""

import logging
from pathlib import Path

import pytest
import torch

from dreambooth.data.latents import Item, gather, moments_key, prompt_key
from dreambooth.data.views import View
from dreambooth.errors import UserError

KEY = "model.data.cached_instance_dir"


class Maker:
    """Makes entries and remembers which."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, []

    def items(self, *names: str) -> list[Item]:
        return [Item(self.folder, KEY, name, lambda name=name: self.make(name)) for name in names]

    def make(self, name: str) -> dict[str, torch.Tensor]:
        self.made.append(name)
        return {"moments": torch.full((4, 2, 2), float(ord(name[0])))}


def test_missing_entries_are_made_once_and_read_back(tmp_path: Path) -> None:
    maker = Maker(tmp_path / "deep" / "cache")
    entries, made = gather(maker.items("a", "b", "a"), "encoding", "latent")
    assert made == 2
    assert maker.made == ["a", "b"]
    assert [float(entry["moments"][0, 0, 0]) for entry in entries] == [97, 98, 97]
    again, made = gather(maker.items("b", "c"), "encoding", "latent")
    assert made == 1
    assert maker.made == ["a", "b", "c"]
    assert torch.equal(again[0]["moments"], entries[1]["moments"])
    assert sorted(path.name for path in maker.folder.iterdir()) == ["a.pt", "b.pt", "c.pt"]


def test_a_damaged_or_foreign_entry_is_made_again_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    maker = Maker(tmp_path)
    gather(maker.items("a", "b", "c", "d", "e", "f"), "encoding", "latent")
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "a.pt").write_bytes(whole["a.pt"][:-100])
    (tmp_path / "b.pt").write_bytes(whole["c.pt"])
    (tmp_path / "c.pt").write_bytes(b"")
    torch.save({"moments": torch.zeros(4)}, tmp_path / "d.pt")
    flipped = bytearray(whole["e.pt"])
    place = flipped.index(torch.full((4,), float(ord("e"))).numpy().tobytes())
    flipped[place] ^= 0xFF
    (tmp_path / "e.pt").write_bytes(flipped)
    maker.made.clear()
    _, made = gather(maker.items("a", "b", "c", "d", "e", "f"), "encoding", "latent")
    assert made == 5
    assert maker.made == ["a", "b", "c", "d", "e"]
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "cached latents that were damaged or foreign, made again: 5"
    ]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole


def test_each_rank_makes_its_share_of_what_is_missing(tmp_path: Path) -> None:
    gather(Maker(tmp_path).items("a"), "encoding", "latent")
    second, made = Maker(tmp_path), []
    waits = iter([lambda: None, lambda: made.extend(gather(second.items(*"ce"), "encoding", "latent")[0])])
    first = Maker(tmp_path)
    _, missing = gather(first.items(*"abcde"), "encoding", "latent", rank=1, world=2, barrier=lambda: next(waits)())
    assert missing == 4
    assert first.made == ["b", "d"]
    assert second.made == ["c", "e"]


def test_what_another_job_stores_between_two_looks_leaves_nothing_unmade(tmp_path: Path) -> None:
    first, other, second = (Maker(tmp_path) for _ in range(3))

    def meanwhile() -> None:
        gather(other.items(*"ac"), "encoding", "latent")
        entries, _ = gather(second.items(*"abcd"), "encoding", "latent", rank=1, world=2)
        assert len(entries) == 4

    waits = iter([meanwhile, lambda: None])
    entries, _ = gather(first.items(*"abcd"), "encoding", "latent", rank=0, world=2, barrier=lambda: next(waits)())
    assert len(entries) == 4
    assert (first.made, second.made) == (["a", "c"], ["b", "d"])


def test_a_full_disk_names_the_file_and_the_key(small_disk: Path) -> None:
    big = Item(small_disk / "cache", KEY, "big", lambda: {"moments": torch.zeros(100_000)})
    with pytest.raises(UserError, match=rf"cannot write {small_disk}/cache/big.pt: No space left.* {KEY}=") as error:
        gather([big], "encoding", "latent")
    assert "\n" not in str(error.value)
    assert list((small_disk / "cache").iterdir()) == []


def test_keys_change_with_what_changes_the_content_and_with_nothing_else() -> None:
    keys = {
        moments_key("hash", View(), 64, "vae"),
        moments_key("other", View(), 64, "vae"),
        moments_key("hash", View((0.5, 0.25)), 64, "vae"),
        moments_key("hash", View(flip=True), 64, "vae"),
        moments_key("hash", View(), 32, "vae"),
        moments_key("hash", View(), 64, "another"),
        prompt_key([[1, 2]], "text"),
        prompt_key([[1, 3]], "text"),
        prompt_key([[1, 2]], "another"),
    }
    assert len(keys) == 9
    assert moments_key("hash", View(), 64, "vae") in keys
