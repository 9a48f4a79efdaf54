"""The whole way from two folders to batches, on a tiny Stable Diffusion."""

import json
import logging
import os
import random
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from dreambooth.data import checks
from dreambooth.data.datamodule import DreamBoothDataModule
from dreambooth.data.latents import gather
from dreambooth.data.views import View, pixels
from dreambooth.errors import UserError
from dreambooth.families.sd import StableDiffusion
from dreambooth.noise import seed_of
from dreambooth.sampling import draw
from dreambooth.tuning.full import Full
from tests.processes import FORK_WARNING, count, kill_after, start

REAL = Path(os.environ.get("DREAMBOOTH_PHOTOS", Path(__file__).parents[2] / "shared" / "data" / "dreambooth" / "dog"))
SAMPLER = {"sampler_type": "DDIM", "inference_steps": 2, "unconditional_guidance_scale": 3.0, "guidance_rescale": 0.0}


@pytest.fixture(scope="module")
def tiny(tiny_sd: Path) -> StableDiffusion:
    """A family of which the denoiser learns."""
    family = StableDiffusion(str(tiny_sd))
    Full(family)
    return family


def trainer(**more: Any) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(accelerator="cpu", **{"devices": 1, **quiet, **more})


def data(family: StableDiffusion, photos: Path, with_trainer: pl.Trainer | None = None, **changes: Any) -> Any:
    given: dict[str, Any] = {
        "instance_dir": str(photos),
        "instance_prompt": "a photo of a sks dog",
        "regularization_dir": str(photos.parent / "reg"),
        "regularization_prompt": "a photo of a dog",
        "sampler": SAMPLER,
        "num_reg_images": 6,
        "resolution": 32,
        "seed": 1,
        **changes,
    }
    module = DreamBoothDataModule(family, **given)
    module.trainer = with_trainer or trainer()
    return module


def ready(*arguments: Any, **changes: Any) -> Any:
    module = data(*arguments, **changes)
    module.setup("fit")
    return module


def made(module: Any) -> tuple[int, int]:
    return module.counts["regularization_generated"], module.counts["latents_encoded"]


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_first_run_makes_everything_second_nothing_and_says_so(
    tiny: StableDiffusion, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (photos / "readme.md").write_text("my dog")
    with caplog.at_level(logging.INFO, "dreambooth"):
        first = ready(tiny, photos)
        second = ready(tiny, photos)
    seconds = first.counts.pop("seconds")
    assert first.counts == {
        "num_instance": 5,
        "num_regularization": 6,
        "regularization_generated": 6,
        "latents_encoded": 11,
    }
    assert set(seconds) == {"prepare_regularization", "cache_latents"}
    assert made(second) == (0, 0)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("dreambooth")] == [
        f"{photos}: not pictures, ignored: readme.md",
        "6 regularization pictures and 11 latents ready, 6 pictures drawn and 11 latents encoded",
        "6 regularization pictures and 11 latents found, nothing to make",
    ]
    assert sorted(os.listdir(photos.parent)) == ["photos", "photos_cached", "reg", "reg_cached"]


def test_a_batch_holds_what_the_networks_say_of_each_picture_alone(tiny: StableDiffusion, photos: Path) -> None:
    module = ready(tiny, photos, micro_batch_size=2)
    batch = next(iter(module.train_dataloader()))
    assert batch["index"] == [0, 1, 2, 3]
    assert batch["is_prior"].tolist() == [False, False, True, True]
    assert batch["moments"].shape == (4, 8, 8, 8)
    for path, moments in zip(batch["paths"], batch["moments"], strict=True):
        alone = tiny.encode_pictures(pixels(Path(path), View(), 32)[None])[0]
        assert torch.equal(moments, alone)
    with torch.no_grad():
        for number, prompt in enumerate(batch["prompts"]):
            assert torch.equal(
                batch["cond"]["prompt_embeds"][number], tiny.encode_prompts([prompt])["prompt_embeds"][0]
            )
    settings = {"steps": 2, "guidance": 3.0, "sampler_type": "DDIM", "negative_prompt": "", "resolution": 32}
    seeds = [seed_of(1, index, "regularization") for index in range(4)]
    drawn = draw(tiny.to_pipeline(), ["a photo of a dog"] * 4, seeds, **settings)
    assert Image.open(photos.parent / "reg" / "00003.png").tobytes() == drawn[3].tobytes()


def test_only_what_changed_is_encoded_again(tiny: StableDiffusion, tiny_sd_v: Path, photos: Path) -> None:
    ready(tiny, photos)
    (photos / "0.png").rename(photos / "renamed.png")
    assert made(ready(tiny, photos)) == (0, 0)
    Image.new("RGB", (40, 40), "red").save(photos / "renamed.png")
    assert made(ready(tiny, photos)) == (0, 1)
    for path in (photos.parent / "photos_cached").iterdir():
        path.write_bytes(path.read_bytes()[:300])
    assert made(ready(tiny, photos)) == (0, 5)
    vanilla = {"with_prior_preservation": False}
    assert made(ready(tiny, photos, resolution=16, **vanilla)) == (0, 5)
    assert made(ready(tiny, photos, **vanilla)) == (0, 0)
    other = StableDiffusion(str(tiny_sd_v))
    assert made(ready(other, photos, **vanilla)) == (0, 5)


def test_a_photo_that_changes_between_two_looks_is_not_kept_under_the_name_of_the_old(
    tiny: StableDiffusion, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replaced(*arguments: Any, **more: Any) -> Any:
        Image.new("RGB", (40, 40), "red").save(photos / "0.png")
        return gather(*arguments, **more)

    monkeypatch.setattr("dreambooth.data.encoder.gather", replaced)
    with pytest.raises(UserError, match=r"^model\.data\.instance_dir: .*0\.png was changed while it was read"):
        ready(tiny, photos, with_prior_preservation=False)
    assert not list(photos.parent.glob("photos_cached/*.pt"))


def test_variants_hold_the_crops_and_flips(tiny: StableDiffusion, photos: Path) -> None:
    crops = {"with_prior_preservation": False, "center_crop": False, "cached_variants": 3}
    module = ready(tiny, photos, **crops)
    assert made(module) == (0, 15)
    ((role,),) = module.ready[0].subjects
    assert [len(variants) for variants in role.moments] == [3] * 5
    assert not torch.equal(role.moments[3][0], role.moments[3][1])
    assert made(ready(tiny, photos, **crops)) == (0, 0)
    assert made(ready(tiny, photos, **{**crops, "seed": 2}))[1] > 10
    flips = ready(tiny, photos, with_prior_preservation=False, random_flip=True, cached_variants=8)
    assert made(flips) == (0, 10)  # as they are, and mirrored


def test_online_encoding_writes_no_cache_and_a_learning_text_encoder_reads_online(
    tiny_sd: Path, photos: Path, tmp_path: Path
) -> None:
    family = StableDiffusion(str(tiny_sd))
    moves: list[tuple[str, ...]] = []
    family.move = lambda device, *names: moves.append((str(device), *names))  # type: ignore[method-assign]
    Full(family)
    batch = next(iter(ready(family, photos, use_cached_latents=False, random_flip=True).train_dataloader()))
    assert batch["pixels"].shape == (2, 3, 32, 32)
    assert batch["cond"]["prompt_embeds"].shape[0] == 2
    assert moves[-2:] == [("cpu", "vae"), ("cpu", "text_encoder")]  # the VAE on the device, the text encoder off
    assert sorted(os.listdir(tmp_path)) == ["photos", "reg"]
    moves.clear()
    Full(family, train_text_encoder=True)
    batch = next(iter(ready(family, photos, train_text_encoder=True).train_dataloader()))
    assert "cond" not in batch
    assert moves[-1] == ("cpu", "vae")
    assert all("text_encoder" not in names for names in moves)


def test_another_model_draws_only_when_something_is_missing(
    tiny: StableDiffusion, tiny_sd_v: Path, photos: Path, tmp_path: Path
) -> None:
    ready(tiny, photos, regularization_dir=str(tmp_path / "a"))
    other = shutil.copytree(tiny_sd_v, tmp_path / "other")
    module = ready(tiny, photos, regularization_dir=str(tmp_path / "b"), restore_from_path=str(other))
    assert made(module) == (6, 6)
    assert (tmp_path / "a" / "00000.png").read_bytes() != (tmp_path / "b" / "00000.png").read_bytes()
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert (manifest["base"], manifest["weights"]) == (str(other), StableDiffusion(str(other)).fingerprint())
    shutil.rmtree(other)
    assert made(ready(tiny, photos, regularization_dir=str(tmp_path / "b"), restore_from_path=str(other))) == (0, 0)
    assert made(ready(tiny, photos, with_prior_preservation=False, restore_from_path=str(other))) == (0, 0)
    with pytest.raises(UserError, match=f"model.restore_from_path.* the set has '{other}'"):
        ready(tiny, photos, regularization_dir=str(tmp_path / "b"))
    with pytest.raises(UserError, match="No model at"):
        ready(tiny, photos, regularization_dir=str(tmp_path / "c"), restore_from_path=str(other))
    shutil.copytree(tiny.source, other)  # another model under the same name
    lost = tmp_path / "b" / "00000.png"
    drawn = lost.read_bytes()
    lost.unlink()
    with pytest.raises(UserError, match=r"restore_from_path is '[0-9a-f]{16}', the set has '[0-9a-f]{16}'.*draw them"):
        ready(tiny, photos, regularization_dir=str(tmp_path / "b"), restore_from_path=str(other))
    shutil.rmtree(other)
    shutil.copytree(tiny_sd_v, other)
    again = ready(tiny, photos, regularization_dir=str(tmp_path / "b"), restore_from_path=str(other))
    assert made(again) == (1, 0)
    assert lost.read_bytes() == drawn


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"instance_dir": "nowhere"}, "model.data.instance_dir: cannot open nowhere"),
        (
            {"resolution": 30},
            "resolution=30 is not a multiple of 4.* model.data.resolution=28 or model.data.resolution=32",
        ),
        ({"resolution": 2}, "resolution=2 is not a multiple of 4, .* type model.data.resolution=4$"),
        ({"cached_instance_dir": "/proc/nowhere"}, "model.data.cached_instance_dir: /proc/nowhere cannot be written"),
        ({"cached_reg_dir": f"{__file__}/x"}, "model.data.cached_reg_dir: .* is a file"),
        ({"regularization_dir": f"{__file__}/x"}, "model.data.regularization_dir: .* is a file"),
        ({"regularization_dir": "/proc/nowhere"}, "model.data.regularization_dir: /proc/nowhere cannot be written"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(
    tiny: StableDiffusion, photos: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    before = files(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        ready(tiny, photos, **change)
    assert "\n" not in str(error.value)
    assert files(tmp_path) == before


def test_a_complete_set_may_lie_where_nobody_can_write(
    tiny: StableDiffusion, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready(tiny, photos)
    folders: list[Path] = []
    monkeypatch.setattr(checks, "writable", lambda folder, key: folders.append(folder))
    again = ready(tiny, photos)
    assert made(again) == (0, 0)
    assert again.classes[0].folder not in folders
    next(again.classes[0].folder.glob("*.png")).unlink()
    ready(tiny, photos)
    assert again.classes[0].folder in folders


def test_unreadable_photos_and_one_folder_for_both_are_refused(tiny: StableDiffusion, photos: Path) -> None:
    with pytest.raises(UserError, match=r"model\.data\.regularization_dir: .* holds the subject"):
        ready(tiny, photos, regularization_dir=f"{photos}/../photos")
    (photos / "fake.png").write_text("text")
    with pytest.raises(UserError, match=r"model\.data\.instance_dir: 1 of 6 .*fake\.png \(not a picture"):
        ready(tiny, photos)
    assert os.listdir(photos.parent) == ["photos"]


def test_a_disk_that_fills_up_while_caching(tiny: StableDiffusion, photos: Path, small_disk: Path) -> None:
    more = {"with_prior_preservation": False, "center_crop": False, "cached_variants": 40}
    with pytest.raises(
        UserError, match=rf"cannot write {small_disk}/c/\w+.pt: No space left.*cached_instance_dir=\.\.\."
    ):
        ready(tiny, photos, cached_instance_dir=str(small_disk / "c"), **more)
    for path in (small_disk / "c").iterdir():
        assert path.suffix == ".pt"
        assert not path.name.startswith(".")
        torch.load(path, weights_only=True)


def run_rank(family: StableDiffusion, photos: Path, rank: int, port: int) -> None:
    """One of two ranks, in the environment that torchrun gives it."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    two = trainer(devices=2, strategy="ddp")
    two.strategy.setup_environment()
    module = ready(family, photos, two)
    assert made(module) == (6, 11)
    batches = list(islice(iter(module.train_dataloader()), 3))
    torch.save([batch["moments"] for batch in batches], photos.parent / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def beside(photos: Path, name: str) -> Path:
    """A copy of the photos in a folder of their own."""
    return shutil.copytree(photos, photos.parent / name / "photos")


@pytest.mark.slow
@pytest.mark.filterwarnings(FORK_WARNING)
def test_two_ranks_and_three_kills_make_what_one_run_makes(tiny: StableDiffusion, photos: Path) -> None:
    alone, ranks, killed = (beside(photos, name) for name in ("alone", "ranks", "killed"))
    whole = ready(tiny, alone, micro_batch_size=2)
    port = random.SystemRandom().randint(20000, 60000)
    both = [start(run_rank, tiny, ranks, rank, port) for rank in range(2)]
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    halves = [torch.load(ranks.parent / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for rank in range(2):
        (ranks.parent / f"rank{rank}.pt").unlink()
    for number, batch in enumerate(islice(iter(whole.train_dataloader()), 3)):
        parts = [halves[rank][number][role] for role in range(2) for rank in range(2)]
        assert torch.equal(torch.stack(parts), batch["moments"])
    assert files(ranks.parent) == files(alone.parent)

    for more in (2, 5, 3):
        before = count(killed.parent)
        assert before < kill_after(more, killed.parent, ready, tiny, killed) < count(alone.parent)
    ready(tiny, killed)
    assert files(killed.parent) == files(alone.parent)


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the DreamBooth photos (DREAMBOOTH_PHOTOS=folder)")
def test_real_photos(tiny: StableDiffusion, tmp_path: Path) -> None:
    more = {"cached_instance_dir": str(tmp_path / "cache"), "regularization_dir": str(tmp_path / "reg")}
    first = ready(tiny, REAL, **more)
    assert made(first) == (6, 6 + len(list(REAL.glob("*.jpg"))))
    assert made(ready(tiny, REAL, **more)) == (0, 0)
    for batch in islice(iter(first.train_dataloader()), 10):
        assert batch["moments"].isfinite().all()
    online = ready(tiny, REAL, **more, use_cached_latents=False, center_crop=False, num_workers=1)
    batch = next(iter(online.train_dataloader()))
    assert batch["pixels"].std() > 0.1
    assert batch["pixels"].abs().max() <= 1
