"""The order of pictures: a function of seed, step and position, whoever asks."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dreambooth.data.pairs import Bucket, Role, Stream, picture_at
from dreambooth.data.views import View, draw_view, pixels
from dreambooth.noise import generator

B = 2


def role(name: str, count: int, variants: int = 3) -> Role:
    """A role whose moments say which picture and variant they are, 100 more for the regularization pictures."""
    base = 100 if name == "regularization" else 0
    moments = [[torch.full((2, 1, 1), base + n + v / 10) for v in range(variants)] for n in range(count)]
    paths = [Path(f"{name}/{number}.png") for number in range(count)]
    prompt, embeds = f"a {name}", {"embeds": torch.full((1, 3), base)}
    return Role(name, [prompt] * count, paths, moments, {prompt: embeds})


ROLES = [role("instance", 5), role("regularization", 7)]


def stream(*subjects: list[Role], **more: Any) -> Stream:
    given = {"micro_batch_size": B, "seed": 1, "center_crop": False, "random_flip": True, **more}
    return Stream([Bucket(8, list(subjects or [ROLES]))], **given)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_batch_pairs_instance_and_regularization_records() -> None:
    batch = stream(world=3, rank=1, accumulate=2).batch(step=4, micro=1)
    assert batch["step"] == 4
    assert batch["global_size"] == 12
    assert batch["index"] == [8, 9, 20, 21]
    assert batch["is_prior"].tolist() == [False, False, True, True]
    assert batch["prompts"] == ["a instance"] * 2 + ["a regularization"] * 2
    assert batch["cond"]["embeds"][:, 0].tolist() == [0, 0, 100, 100]
    assert batch["moments"].shape == (4, 2, 1, 1)
    numbers = [f"{int(value) % 100}.png" for value in batch["moments"][:, 0, 0, 0]]
    assert [Path(path).name for path in batch["paths"]] == numbers
    assert numbers[:2] == [f"{picture_at(4 * 12 + position, 5, 1, 'instance')}.png" for position in (8, 9)]
    alone = stream(ROLES[:1]).batch(0, 0)
    assert alone["is_prior"].tolist() == [False, False]


def test_every_epoch_shows_every_picture_once_in_a_new_order() -> None:
    shown = [picture_at(place, 5, 1, "instance") for place in range(20)]
    epochs = [tuple(shown[first : first + 5]) for first in range(0, 20, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len(set(epochs)) > 1
    assert shown != [picture_at(place, 5, 2, "instance") for place in range(20)]


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_ranks_and_accumulation_only_divide_the_global_batch(world: int, accumulate: int) -> None:
    whole = stream(micro_batch_size=B * world * accumulate).batch(3, 0)
    parts = [
        stream(world=world, rank=r, accumulate=accumulate).batch(3, j) for j in range(accumulate) for r in range(world)
    ]
    for key in ("index", "paths", "prompts"):
        halves = [[part[key][half : half + B] for part in parts] for half in (0, B)]
        assert [value for half in halves for piece in half for value in piece] == whole[key]
    moments = torch.cat([part["moments"][half : half + B] for half in (0, B) for part in parts])
    assert torch.equal(moments, whole["moments"])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_goes_on_from_any_step_with_any_workers(workers: int) -> None:
    unbroken = list(islice(stream(accumulate=2), 10))
    loader = DataLoader(stream(accumulate=2, first_step=2), batch_size=None, num_workers=workers)
    resumed = list(islice(loader, 6))
    assert [batch["step"] for batch in resumed] == [2, 2, 3, 3, 4, 4]
    assert all(same(a, b) for a, b in zip(unbroken[4:], resumed, strict=True))
    assert len({float(batch["moments"].sum()) for batch in unbroken}) > 5


def test_variants_and_fresh_crops_are_functions_of_the_step_and_all_occur(photos: Path) -> None:
    seen = {
        round(float(value) % 1, 1) for step in range(30) for value in stream().batch(step, 0)["moments"][:, 0, 0, 0]
    }
    assert seen == {0.0, 0.1, 0.2}
    files = sorted(photos.iterdir())
    online = stream([Role("instance", ["p"] * len(files), files, None, None)])
    first, again = online.batch(7, 0), online.batch(7, 0)
    assert first["pixels"].shape == (B, 3, 8, 8)
    assert same(first, again)
    assert "cond" not in first
    assert "moments" not in first
    one = stream([Role("instance", ["p"], files[3:4], None, None)])
    assert len({float(one.batch(step, 0)["pixels"][0].double().sum()) for step in range(20)}) > 5


def test_pixels_are_resized_cropped_and_flipped(tmp_path: Path) -> None:
    ramp = Image.linear_gradient("L").rotate(90).resize((64, 32))  # black on the left, white on the right
    ramp.convert("RGB").save(tmp_path / "ramp.png")
    views = {at: pixels(tmp_path / "ramp.png", View((at, 0.5)), 16) for at in (0.0, 0.5, 1.0)}
    assert views[0.0].shape == (3, 16, 16)
    assert views[0.0].min() < -0.9
    assert views[1.0].max() > 0.9
    assert abs(float(views[0.5].mean())) < 0.02
    assert torch.equal(pixels(tmp_path / "ramp.png", View((1.0, 0.5), flip=True), 16), views[1.0].flip(2))
    Image.new("RGB", (5, 3), "white").save(tmp_path / "small.png")
    assert torch.equal(pixels(tmp_path / "small.png", View(), 16), torch.ones(3, 16, 16))


def test_what_is_not_random_is_centred_and_unflipped() -> None:
    views = {draw_view(generator(n, "view"), center_crop=True, random_flip=False) for n in range(5)}
    assert views == {View()}
    views = {draw_view(generator(n, "view"), center_crop=False, random_flip=False) for n in range(5)}
    assert len(views) == 5
    assert not any(view.flip for view in views)
    flips = [draw_view(generator(n, "view"), center_crop=True, random_flip=True).flip for n in range(200)]
    assert 70 < sum(flips) < 130
