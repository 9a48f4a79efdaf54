"""Captions: what is read for each picture, what is refused, and how often the empty prompt takes their place."""

import json
import logging
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from dreambooth import UserError, compose
from dreambooth.data.captions import read_captions
from dreambooth.data.pairs import Bucket, Stream
from dreambooth.families.sd import StableDiffusion
from dreambooth.files import pictures_among
from tests.test_datamodule import ready
from tests.test_pairs import ROLES, same

PROMPT = "a photo of a sks dog"


@pytest.fixture(scope="module")
def tiny(tiny_sd: Path) -> StableDiffusion:
    return StableDiffusion(str(tiny_sd))


def pictures(folder: Path) -> list[Path]:
    return pictures_among(sorted(folder.iterdir()))


def write_sidecars(folder: Path) -> None:
    for path in pictures(folder):
        path.with_suffix(".txt").write_text(f"a sks dog,\n number {path.stem}\n")


def write_table(folder: Path, **changes: str) -> Path:
    lines = [
        json.dumps({"file_name": path.name, "caption" if path.stem == "1" else "text": f"dog {path.stem}"})
        for path in pictures(folder)
    ]
    file = folder / "metadata.jsonl"
    file.write_text("".join(line + "\n" for line in lines) + changes.get("more", ""))
    return file


def test_a_picture_s_words_come_from_the_prompt_its_sidecar_or_its_line(photos: Path, tmp_path: Path) -> None:
    paths = pictures(photos)
    write_sidecars(photos)
    file = write_table(photos)
    elsewhere = tmp_path / "words.jsonl"
    elsewhere.write_text(file.read_text())
    numbered = [f"a sks dog, number {n}" for n in range(5)]
    assert read_captions(paths, None, "{caption}", PROMPT) == [PROMPT] * 5
    assert read_captions(paths, "sidecar", "{caption}", PROMPT) == numbered
    for captions in ("metadata.jsonl", str(elsewhere)):
        assert read_captions(paths, captions, "{caption}", PROMPT) == [f"dog {n}" for n in range(5)]
    paths[0].with_suffix(".txt").write_text("with {prompt} in it")
    assert read_captions(paths, "sidecar", "{prompt}: {caption}", "a dog")[0] == "a dog: with {prompt} in it"
    named = [photos / "on_the-beach.png"]
    assert read_captions(named, None, "{prompt}, {name}", PROMPT) == [f"{PROMPT}, on the beach"]


@pytest.mark.parametrize(
    ("captions", "spoil", "words"),
    [
        ("sidecar", lambda folder: (folder / "1.txt").unlink(), r"1\.jpg has no 1\.txt beside it"),
        ("sidecar", lambda folder: (folder / "1.txt").write_text(" \n"), r"1\.txt has an empty caption"),
        ("sidecar", lambda folder: (folder / "1.txt").write_bytes(b"\xff\xfe\xff"), r"1\.txt cannot be read .*UTF-8"),
        ("nowhere.jsonl", lambda folder: None, r"nowhere\.jsonl cannot be read \(No such file"),
        ("metadata.jsonl", lambda folder: write_table(folder, more="{oh"), r"jsonl, line 6 is not JSON \(Expecting"),
        ("metadata.jsonl", lambda folder: write_table(folder, more='{"file_name": "9.png", "text": "x"}'), "9.png, wh"),
        ("metadata.jsonl", lambda folder: write_table(folder, more='{"file_name": "0.png", "text": "x"}'), "a second"),
        ("metadata.jsonl", lambda folder: write_table(folder, more='{"file_name": "0.png"}'), "line 6 lacks a word"),
        ("metadata.jsonl", lambda folder: write_table(folder, more="[1]"), "line 6 lacks a word"),
        ("metadata.jsonl", lambda folder: write_table(folder, more='{"file_name": "0.png", "text": ""}'), "empty cap"),
        ("metadata.jsonl", lambda folder: (folder / "metadata.jsonl").write_text(""), r"no line for 0\.png and 4 more"),
    ],
)
def test_wrong_captions_are_one_line_before_anything_is_written(
    tiny: StableDiffusion, photos: Path, captions: str, spoil: Any, words: str
) -> None:
    write_sidecars(photos)
    write_table(photos)
    spoil(photos)
    before = sorted(photos.parent.rglob("*"))
    with pytest.raises(UserError, match=rf"model\.data\.captions.*{words}") as error:
        ready(tiny, photos, captions=captions)
    assert "\n" not in str(error.value)
    assert sorted(photos.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.data.caption_dropout=1", "at least 0 and below 1"),
        ("model.data.caption_template='{captoin}'", "made of words, {caption}, {prompt} and {name}"),
        ("model.data.caption_template=''", "made of words"),
    ],
)
def test_wrong_values_are_one_line(override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        compose([override])


@pytest.mark.parametrize("cached", [True, False])
def test_each_distinct_caption_is_read_once_and_stands_with_its_picture(
    tiny: StableDiffusion, photos: Path, caplog: pytest.LogCaptureFixture, cached: bool
) -> None:
    write_sidecars(photos)
    (photos / "0.txt").write_text("a sks dog, number 1")
    more = {"captions": "sidecar", "caption_dropout": 0.3, "use_cached_latents": cached, "micro_batch_size": 2}
    with caplog.at_level(logging.WARNING, "dreambooth"):
        module = ready(tiny, photos, **more)
    assert not [record for record in caplog.records if "ignored" in record.getMessage()]
    assert module.ready[0].subjects[0][0].conds.keys() == {"", *(f"a sks dog, number {n}" for n in range(1, 5))}
    spoken = []
    for batch in islice(module.train_dataloader(), 12):
        for number, (path, prompt) in enumerate(zip(batch["paths"], batch["prompts"], strict=True)):
            own = (
                "a photo of a dog" if batch["is_prior"][number] else f"a sks dog, number {max(int(Path(path).stem), 1)}"
            )
            assert prompt in ("", own)
            expected = tiny.encode_prompts([prompt])["prompt_embeds"][0]
            assert torch.equal(batch["cond"]["prompt_embeds"][number], expected)
            spoken.append(prompt)
    assert "" in spoken
    assert len(set(spoken)) == 6
    online = ready(tiny, photos, **more, train_text_encoder=True)
    for with_cond, without in zip(module.train_dataloader(), islice(online.train_dataloader(), 5), strict=False):
        assert with_cond["prompts"] == without["prompts"]
        assert "cond" not in without


def test_dropout_is_a_function_of_the_position_of_its_own_rate_and_of_nothing_else() -> None:
    def prompts(**more: Any) -> list[dict[str, Any]]:
        given = {"seed": 1, "center_crop": True, "random_flip": False, "caption_dropout": 0.25}
        roles = [type(role)(**{**vars(role), "conds": None}) for role in ROLES]
        return list(islice(Stream([Bucket(8, [roles])], **{"micro_batch_size": 4, **given, **more}), 200))

    whole = prompts()
    dropped = [prompt == "" for batch in whole for prompt in batch["prompts"]]
    assert abs(sum(dropped) / len(dropped) - 0.25) < 0.03
    halves = [prompts(micro_batch_size=2, world=2, rank=rank) for rank in range(2)]
    for batch, first, second in zip(whole, *halves, strict=True):
        assert batch["prompts"] == [
            *first["prompts"][:2],
            *second["prompts"][:2],
            *first["prompts"][2:],
            *second["prompts"][2:],
        ]
    without = prompts(caption_dropout=0.0)
    for batch, plain in zip(whole, without, strict=True):
        assert "" not in plain["prompts"]
        assert same({**batch, "prompts": plain["prompts"]}, plain)
    assert all(same(a, b) for a, b in zip(whole[150:], prompts(first_step=150), strict=False))
