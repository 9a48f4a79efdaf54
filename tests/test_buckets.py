"""Buckets: their shapes, what a picture looks like in one, when each has its turn, and a training with them."""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dreambooth import UserError, compose
from dreambooth.data.buckets import bucket_shapes, nearest_shape, pools
from dreambooth.data.masks import Masks
from dreambooth.data.pairs import Bucket, Stream
from dreambooth.data.views import View, pixels, sides
from dreambooth.families.sd import StableDiffusion
from dreambooth.files import open_picture
from tests.test_captions import pictures
from tests.test_datamodule import beside, data, ready
from tests.test_masks import write_masks
from tests.test_pairs import role, same

SHAPES = {"0.png": 32, "1.jpg": 32, "2.png": 32, "3.jpg": (40, 24), "4.png": (24, 40)}  # of the photos of conftest


@pytest.fixture(scope="module")
def tiny(tiny_sd: Path) -> StableDiffusion:
    return StableDiffusion(str(tiny_sd))


def test_the_shapes_of_stable_diffusion() -> None:
    assert bucket_shapes(512, 64, 2.0) == [(384, 640), (448, 576), 512, (576, 448), (640, 384)]
    assert bucket_shapes(64, 16, 1.0) == [64]


@pytest.mark.parametrize(
    ("resolution", "multiple", "ratio"), [(512, 64, 3.0), (768, 8, 2.0), (1024, 64, 4.0), (64, 16, 9)]
)
def test_shapes_are_whole_of_one_area_and_not_too_long(resolution: int, multiple: int, ratio: float) -> None:
    shapes = bucket_shapes(resolution, multiple, ratio)
    assert resolution in shapes
    for shape in shapes:
        width, height = sides(shape)
        assert width % multiple == height % multiple == 0
        assert resolution**2 - multiple * max(width, height) < width * height <= resolution**2
        assert max(width, height) <= ratio * min(width, height)
        assert (height, width) in shapes or width == height


def test_a_photo_goes_where_its_ratio_is_nearest(photos: Path) -> None:
    shapes = bucket_shapes(32, 8, 2.0)
    assert shapes == [(24, 40), 32, (40, 24)]
    found = {path.name: shape for shape, pool in pools(pictures(photos), shapes).items() for path in pool}
    assert found == SHAPES
    assert nearest_shape((5000, 100), shapes) == (40, 24)
    assert nearest_shape((100, 100), [64, 32]) == 64


def test_a_picture_just_covers_its_shape(tmp_path: Path) -> None:
    """A ramp from black to white: along it nothing is lost where it is cropped across, and the other way round."""
    Image.linear_gradient("L").rotate(90).resize((64, 32)).convert("RGB").save(tmp_path / "ramp.png")
    wide = pixels(tmp_path / "ramp.png", View(), (40, 16))
    assert wide.shape == (3, 16, 40)
    assert wide.min() < -0.9
    assert wide.max() > 0.9
    tall = pixels(tmp_path / "ramp.png", View((0.0, 0.5)), (16, 40))
    assert tall.shape == (3, 40, 16)
    assert tall.min() < -0.9
    assert tall.max() < -0.5
    assert torch.equal(pixels(tmp_path / "ramp.png", View(), (16, 16)), pixels(tmp_path / "ramp.png", View(), 16))


def scheduled(**more: Any) -> Stream:
    """Three buckets with 5, 2 and 1 photos, of one subject and its class of 4."""
    buckets = [
        Bucket((8, 8 + place), [[role(f"instance {place}", count), role("regularization", 4)]], count)
        for place, count in enumerate((5, 2, 1))
    ]
    given = {"micro_batch_size": 2, "seed": 1, "center_crop": True, "random_flip": False, **more}
    return Stream(buckets, **given)


def test_a_step_has_one_bucket_and_every_photo_is_seen_equally_often() -> None:
    """8 photos: of 40 steps 25, 10 and 5, in no fixed order; of 80 positions 10 for each photo."""
    batches = list(islice(scheduled(), 40))
    shown = [{Path(path).parent.name for path in batch["paths"][:2]} for batch in batches]
    assert all(len(names) == 1 for names in shown)
    order = ["".join(names) for names in shown]
    assert Counter(order) == {"instance 0": 25, "instance 1": 10, "instance 2": 5}
    assert len({tuple(order[first : first + 8]) for first in range(0, 40, 8)}) > 1
    assert set(Counter(path for batch in batches for path in batch["paths"][:2]).values()) == {10}


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (2, 2)])
def test_the_buckets_are_the_same_at_any_world_size_and_after_a_resume(world: int, accumulate: int) -> None:
    whole = list(islice(scheduled(micro_batch_size=world * accumulate), 20))
    for step, batch in enumerate(whole):
        parts = [
            scheduled(micro_batch_size=1, world=world, rank=rank, accumulate=accumulate).batch(step, micro)
            for micro in range(accumulate)
            for rank in range(world)
        ]
        assert [part["paths"][half] for half in (0, 1) for part in parts] == batch["paths"]
    resumed = islice(scheduled(micro_batch_size=world * accumulate, first_step=13), 7)
    assert all(same(a, b) for a, b in zip(whole[13:], resumed, strict=True))


@pytest.mark.parametrize("cached", [True, False])
def test_photos_and_class_pictures_of_a_batch_have_the_shape_of_its_bucket(
    tiny: StableDiffusion, photos: Path, cached: bool
) -> None:
    write_masks(photos)
    module = ready(tiny, photos, buckets=True, masks="files", micro_batch_size=2, use_cached_latents=cached)
    assert [(bucket.shape, bucket.turns) for bucket in module.ready] == [((24, 40), 1), (32, 3), ((40, 24), 1)]
    assert module.counts["num_instance"] == 5
    seen, masks = set(), Masks("files", 0.1, tiny.vae_scale_factor)
    for batch in islice(module.train_dataloader(), 10):
        for number, path in enumerate(map(Path, batch["paths"])):
            shape = SHAPES[Path(batch["paths"][0]).name]
            expected = pixels(path, View(), shape)
            if cached:
                assert torch.equal(batch["moments"][number], tiny.encode_pictures(expected[None])[0])
            else:
                assert torch.equal(batch["pixels"][number], expected)
            if not batch["is_prior"][number]:
                assert torch.equal(batch["mask"][number], masks.weight(path, View(), shape))
        seen.add(shape)
    assert len(seen) == 3
    if cached:
        assert module.counts["latents_encoded"] == 5 + 3 * 6
        again = ready(tiny, photos, masks="files")  # the squares are those of a run without buckets
        assert again.counts["latents_encoded"] == 2


def test_square_photos_make_one_bucket_that_changes_nothing(tiny: StableDiffusion, photos: Path) -> None:
    for path in pictures(photos):
        image = open_picture(path).resize((40, 40))
        image.save(path)
    plain, buckets = ready(tiny, photos), ready(tiny, photos, buckets=True)
    assert buckets.counts["latents_encoded"] == 0
    for a, b in zip(islice(plain.train_dataloader(), 9), buckets.train_dataloader(), strict=False):
        assert same(a, b)


def test_a_subject_without_a_photo_of_a_shape_shows_all_of_its_own(tiny: StableDiffusion, photos: Path) -> None:
    dog, cat = beside(photos, "dog"), beside(photos, "cat")
    for path in pictures(cat):
        open_picture(path).resize((40, 40)).save(path)
    subjects = [
        {"instance_dir": str(folder), "instance_prompt": f"a sks {folder.parent.name}"}
        | {"regularization_prompt": "a dog"}
        for folder in (dog, cat)
    ]
    module = ready(tiny, photos, subjects=subjects, buckets=True, micro_batch_size=2)
    counted = {bucket.shape: [len(roles[0].paths) for roles in bucket.subjects] for bucket in module.ready}
    assert counted == {(24, 40): [1, 5], 32: [3, 5], (40, 24): [1, 5]}
    assert [bucket.turns for bucket in module.ready] == [1, 8, 1]
    for batch in islice(module.train_dataloader(), 6):
        assert [Path(path).parent.parent.name for path in batch["paths"]][:2] == ["dog", "cat"]


def test_a_resolution_that_is_no_bucket_is_refused(tiny: StableDiffusion, photos: Path) -> None:
    with pytest.raises(UserError, match=r"buckets=true: .*=36 is not a multiple of 8, .*=32 or .*=40$"):
        data(tiny, photos, resolution=36, buckets=True).check()
    with pytest.raises(UserError, match=r"model\.data\.bucket_ratio=0\.5: must be at least 1"):
        compose(["model.data.bucket_ratio=0.5"])
