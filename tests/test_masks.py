"""Masks: their weights on the latent grid, the loss under them, where they come from, and what is refused."""

import logging
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from dreambooth import UserError, compose
from dreambooth.data.masks import Masks, mask_of
from dreambooth.data.views import View, pixels
from dreambooth.families.sd import StableDiffusion
from dreambooth.files import file_hash, list_pictures, open_picture
from dreambooth.objective import Diffusion
from tests.steps import trained
from tests.test_captions import pictures
from tests.test_datamodule import ready
from tests.tiny import short_run


@pytest.fixture(scope="module")
def tiny(tiny_sd: Path) -> StableDiffusion:
    return StableDiffusion(str(tiny_sd))


def write_masks(folder: Path, white: bool = False) -> None:
    """A white disc, or white all over, for each photo."""
    for path in pictures(folder):
        mask = Image.new("L", open_picture(path).size, 255 if white else 0)
        ImageDraw.Draw(mask).ellipse((4, 4, 26, 26), fill=255)
        mask.save(mask_of(path))


def write_alpha(folder: Path) -> None:
    """The same masks as the transparency of the photos."""
    write_masks(folder)
    for path in pictures(folder):
        mask, image = open_picture(mask_of(path)).convert("L"), open_picture(path)
        mask_of(path).unlink()
        path.unlink()
        image.putalpha(mask)
        image.save(path.with_suffix(".png"))


def test_the_weights_of_a_mask_by_hand(tmp_path: Path) -> None:
    """8x8 pixels, cells of 4: the left cells are half and all white, the right ones a quarter and black."""
    mask = np.zeros((8, 8), np.uint8)
    mask[:2, :4] = mask[4:, :4] = mask[:2, 4:6] = 255
    Image.fromarray(mask).save(tmp_path / "a_mask.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    cells = torch.tensor([[0.5, 0.25], [1.0, 0.0]])
    for floor in (0.0, 0.3):
        masks = Masks("files", floor, 4)
        expected = cells.clamp(min=floor)
        weight = masks.weight(tmp_path / "a.jpg", View(), 8)
        torch.testing.assert_close(weight, expected[None] / expected.mean())
        flipped = masks.weight(tmp_path / "a.jpg", View(flip=True), 8)
        torch.testing.assert_close(flipped, weight.flip(2))
    assert torch.equal(Masks(None, 0.1, 4).weight(tmp_path / "a.jpg", View(), 8), torch.ones(1, 2, 2))


def test_a_view_of_the_mask_is_that_of_the_picture_and_may_show_nothing_of_it(tmp_path: Path) -> None:
    mask = Image.new("L", (128, 32))
    mask.paste(255, (0, 0, 48, 32))
    mask.save(tmp_path / "a_mask.png")
    masks = Masks("files", 0.0, 4)
    assert torch.equal(masks.weight(tmp_path / "a.png", View((0.0, 0.5)), 16), torch.ones(1, 4, 4))
    assert torch.equal(masks.weight(tmp_path / "a.png", View((1.0, 0.5)), 16), torch.zeros(1, 4, 4))
    half = masks.weight(tmp_path / "a.png", View((1 / 3, 0.5)), 16)
    torch.testing.assert_close(half, torch.tensor([2.0, 2, 0, 0]).expand(1, 4, 4), atol=0.1, rtol=0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_loss_under_a_mask_is_the_weighted_mean_of_the_error(kind: str) -> None:
    g = torch.Generator().manual_seed(0)
    x0, noise, pred = (torch.randn(2, 3, 2, 2, generator=g) for _ in range(3))
    diffusion, t = Diffusion(torch.linspace(0.99, 0.01, 100), kind), torch.tensor([10, 90])
    mask = torch.tensor([[0.5, 0.25], [1.0, 0.0]]).expand(2, 1, 2, 2)
    target = diffusion.target(x0, noise, t)
    error = (pred - target).square()
    by_hand = sum(mask[:, :, i, j] * error[:, :, i, j] for i in (0, 1) for j in (0, 1)).sum(1) / (3 * 1.75)
    weighted = diffusion.loss(pred, target, t, mask=mask / mask.mean((1, 2, 3), keepdim=True))
    torch.testing.assert_close(weighted, by_hand)

    def half(snr: torch.Tensor) -> torch.Tensor:
        return snr / 2

    for weighting in (None, half):
        alike = diffusion.loss(pred, target, t, weighting, mask=torch.ones(2, 1, 2, 2))
        assert torch.equal(alike, diffusion.loss(pred, target, t, weighting))


@pytest.mark.parametrize("kind", ["files", "alpha"])
@pytest.mark.parametrize("cached", [True, False])
def test_each_picture_comes_with_its_mask_and_the_class_with_none(
    tiny: StableDiffusion, photos: Path, caplog: pytest.LogCaptureFixture, kind: str, cached: bool
) -> None:
    (write_masks if kind == "files" else write_alpha)(photos)
    with caplog.at_level(logging.WARNING, "dreambooth"):
        module = ready(tiny, photos, masks=kind, use_cached_latents=cached, micro_batch_size=2, seed=3)
    assert not [record for record in caplog.records if "ignored" in record.getMessage()]
    assert module.counts["num_instance"] == 5
    expected = Masks(kind, 0.1, tiny.vae_scale_factor)
    for batch in islice(module.train_dataloader(), 4):
        assert batch["mask"].shape == (4, 1, 8, 8)
        for path, mask, is_prior in zip(batch["paths"], batch["mask"], batch["is_prior"], strict=True):
            own = torch.ones(1, 8, 8) if is_prior else expected.weight(Path(path), View(), 32)
            assert torch.equal(mask, own)
            assert is_prior or mask.std() > 0.1
            assert abs(float(mask.mean()) - 1) < 1e-5


def test_a_cached_variant_and_its_mask_are_of_one_view(tiny: StableDiffusion, photos: Path) -> None:
    write_masks(photos)
    crops = {"center_crop": False, "random_flip": True, "cached_variants": 4, "with_prior_preservation": False}
    module = ready(tiny, photos, masks="files", **crops)
    ((role,),) = module.ready[0].subjects
    for picture, path in enumerate(role.paths):
        by_pixels = [tiny.encode_pictures(seen)[0] for seen in views_of(module, path, "pixels")]
        for variant, (moments, mask) in enumerate(zip(by_pixels, views_of(module, path, "mask"), strict=True)):
            assert torch.equal(role.moments[picture][variant], moments)
            assert torch.equal(role.weights[picture][variant], mask)


def views_of(module: Any, path: Path, what: str) -> list[torch.Tensor]:
    masks = Masks("files", 0.1, module.family.vae_scale_factor)
    views = module.views(file_hash(path))
    return [pixels(path, view, 32)[None] if what == "pixels" else masks.weight(path, view, 32) for view in views]


def spoil(folder: Path, what: str) -> None:
    if what == "absent":
        (folder / "1_mask.png").unlink()
    elif what == "no picture":
        (folder / "1_mask.png").write_text("text")
    else:
        size = open_picture(folder / "1.jpg").size
        Image.new("L", (9, 9) if what == "another size" else size, 255 * (what == "another size")).save(
            folder / "1_mask.png"
        )


@pytest.mark.parametrize(
    ("kind", "what", "words"),
    [
        ("files", "absent", r"masks=files: .*1_mask\.png cannot be read \(No such file"),
        ("files", "no picture", r"masks=files: .*1_mask\.png cannot be read \(not a picture"),
        ("files", "another size", r"masks: .*1_mask\.png has 9x9 pixels, 1\.jpg 40x48"),
        ("files", "black", r"masks: .*1_mask\.png is empty"),
        ("alpha", "black", r"masks=alpha: .*0\.png has no transparency"),
    ],
)
def test_wrong_masks_are_one_line_before_anything_is_written(
    tiny: StableDiffusion, photos: Path, kind: str, what: str, words: str
) -> None:
    write_masks(photos)
    spoil(photos, what)
    before = sorted(photos.parent.rglob("*"))
    with pytest.raises(UserError, match=words) as error:
        ready(tiny, photos, masks=kind)
    assert "\n" not in str(error.value)
    assert sorted(photos.parent.rglob("*")) == before


def test_mask_files_are_never_photos(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_masks(photos)
    Image.new("RGB", (8, 8)).save(photos / "carnival_mask.png")  # nobody's mask, so a picture of one
    names = [path.name for path in list_pictures(photos, "key")]
    assert names == ["0.png", "1.jpg", "2.png", "3.jpg", "4.png", "carnival_mask.png"]
    assert "not pictures, ignored: 0_mask.png" in caplog.text
    assert "model.data.masks=files takes the masks" in caplog.text


def test_only_two_kinds_of_masks() -> None:
    with pytest.raises(UserError, match=r"model\.data\.masks=file: there is no such choice; did you mean 'files'"):
        compose(["model.data.masks=file"])
    with pytest.raises(UserError, match=r"model\.data\.mask_floor=1: must be at least 0 and below 1"):
        compose(["model.data.mask_floor=1"])


@pytest.mark.slow
def test_white_masks_train_the_same_weights_and_others_do_not(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    plain = trained(2, *short_run(tiny_sd, photos, tmp_path / "plain"))
    write_masks(photos, white=True)
    white = trained(2, *short_run(tiny_sd, photos, tmp_path / "white"), "model.data.masks=files")
    assert all(torch.equal(plain[name], white[name]) for name in plain)
    write_masks(photos)
    masked = trained(2, *short_run(tiny_sd, photos, tmp_path / "masked"), "model.data.masks=files")
    assert not all(torch.equal(plain[name], masked[name]) for name in plain)
