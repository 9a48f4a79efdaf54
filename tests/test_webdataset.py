"""Pictures streamed from tar shards: what is in a shard, the order, the batches, and runs on them."""

import json
import logging
import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from io import BytesIO
from itertools import islice, product, takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import DataLoader

from dreambooth import compose
from dreambooth.data import streaming
from dreambooth.data.readers import Reader
from dreambooth.data.sharded import ShardedDataModule
from dreambooth.data.shards import expand, inspect, pictures
from dreambooth.data.streaming import FolderRole, ShardRole, ShardStream
from dreambooth.errors import UserError
from dreambooth.families.sd import StableDiffusion
from dreambooth.parallel.tensors import read
from dreambooth.sharding import shard
from dreambooth.tasks import train
from tests.processes import FORK_WARNING
from tests.test_datamodule import SAMPLER, trainer

KEY = "model.data.instance_shards"


def png(red: int, side: int = 40) -> bytes:
    """A picture of one colour."""
    memory = BytesIO()
    Image.new("RGB", (side, side), (red, 0, 0)).save(memory, "PNG")
    return memory.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    return path


def write_shards(folder: Path, sizes: list[int], captions: bool = False) -> list[str]:
    """Shards of so many pictures; picture n is of the red level n, its caption "red n"."""
    number, paths = 0, []
    for place, size in enumerate(sizes):
        members: dict[str, bytes] = {}
        for _ in range(size):
            members[f"{number:04d}.png"] = png(number)
            if captions:
                members[f"{number:04d}.txt"] = f"red {number}".encode()
            number += 1
        paths.append(str(write_tar(folder / f"{place:02d}.tar", members)))
    return paths


def numbers(found: Any) -> list[int]:
    return [int(Path(picture.place).stem) for picture in found]


def test_a_shard_gives_its_pictures_with_their_captions(tmp_path: Path) -> None:
    members = {"a.b.png": png(1), "a.b.txt": b" a red square \n", "c.JPG": png(2), "notes.md": b"x", "d.txt": b"alone"}
    path = write_tar(tmp_path / "s.tar", members)
    found = list(pictures(str(path)))
    assert [(picture.place, picture.caption) for picture in found] == [
        (f"{path}/a.b.png", "a red square"),
        (f"{path}/c.jpg", None),
    ]
    assert found[0].data == members["a.b.png"]
    subprocess.run(["gzip", "-k", path], check=True)
    for same in (f"pipe:cat {path}", f"pipe:gzip -dc {path}.gz", f"{path}.gz"):
        assert [picture.data for picture in pictures(same)] == [picture.data for picture in found]


@pytest.mark.slow
@pytest.mark.parametrize("sign", ["USR1", "TERM", "INT"])
def test_a_signal_to_every_process_ends_no_command_that_a_shard_comes_from(sign: str, tmp_path: Path) -> None:
    """As SLURM sends it: the run notes it and goes on to the end of its step, which needs the rest of the shard."""
    (shard,) = write_shards(tmp_path, [250])
    assert Path(shard).stat().st_size > 200_000  # beyond what a pipe holds
    code = f"""
import os, signal
from dreambooth.data.shards import pictures
os.setpgrp()
signal.signal(signal.SIG{sign}, lambda *_: None)
for number, _ in enumerate(pictures("pipe:cat {shard}")):
    if number == 3:
        os.killpg(0, signal.SIG{sign})
print(number + 1)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "250\n", done.stderr


def test_globs_braces_lists_and_commands_name_shards(tmp_path: Path) -> None:
    a, b, c = write_shards(tmp_path, [1, 1, 1])
    assert expand(f"{tmp_path}/*.tar", KEY) == [a, b, c]
    assert expand(f"{tmp_path}/{{00..01}}.tar", KEY) == [a, b]
    assert expand([c, f"{tmp_path}/{{00,01}}.tar"], KEY) == [c, a, b]
    assert expand(f"pipe:cat {tmp_path}/{{00..01}}.tar", KEY) == [f"pipe:cat {a}", f"pipe:cat {b}"]
    assert expand("pipe:awk '{ if (x) {print}'", KEY) == ["pipe:awk '{ if (x) {print}'"]


def test_what_is_wrong_with_shards_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (whole,) = write_shards(tmp_path / "whole", [3])
    content = Path(whole).read_bytes()
    broken = {
        "member.tar": (content[:700], "cannot be read to its end"),  # within the first picture
        "boundary.tar": (content[:1024], "is cut short: its end mark is missing"),  # tarfile says nothing
        "empty.tar": (b"", "cannot be read to its end"),
        "junk.tar": (b"junk" * 1000, "cannot be read to its end"),
    }
    for name, (data, words) in broken.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=rf"^{KEY}: shard {tmp_path}/{name} {words}[^\n]*$"):
            inspect([whole, str(tmp_path / name)], KEY)
    write_tar(tmp_path / "texts.tar", {"a.txt": b"a", "b.md": b"b"})
    for source, words in (
        (f"{tmp_path}/texts.tar", "texts.tar holds no picture"),
        (f"{tmp_path}/*.tgz", r"no shard matches .*\.tgz; task=shard"),
        (f"{tmp_path}", r"it is a folder: type .*/\*\.tar"),
        ("pipe:no-such-command x", "exit 127, no such command"),
        (f"pipe:cat {tmp_path}/boundary.tar", "is cut short"),
        (f"pipe:cat {whole}; exit 3", "exit 3"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            [len(list(pictures(each))) for each in expand(source, KEY)]
        assert "\n" not in str(caught.value)
    assert "no-such-command" in capfd.readouterr().err  # the shell's own word for it


@pytest.mark.parametrize(("shard", "program"), [("https://x.org/0.tar", "curl"), ("gs://x/0.tar", "gsutil")])
def test_a_program_that_fetches_shards_and_is_not_here_is_named(shard, program, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        UserError, match=rf"^{KEY}: shard {shard} is fetched by the program {program}, which is not here"
    ):
        inspect([shard], KEY)
    with pytest.raises(UserError, match=r"cannot be read to its end \(No such file"):
        list(pictures(f"file://{tmp_path}/0.tar"))


@pytest.mark.parametrize(("sizes", "readers"), [([4, 4, 4, 4], 2), ([3, 5, 2], 2), ([7], 3), ([2, 1], 8), ([5, 3], 4)])
def test_readers_share_the_pictures_and_none_waits_or_starves(tmp_path: Path, sizes: list[int], readers: int) -> None:
    paths = write_shards(tmp_path, sizes)
    all_readers = [Reader(paths, "instance", 1, 3, number, readers) for number in range(readers)]
    epochs = [[numbers(reader.shuffled(epoch)) for reader in all_readers] for epoch in range(8)]
    for epoch in epochs:
        assert sorted(number for part in epoch for number in part) == list(range(sum(sizes)))
    assert len({tuple(map(tuple, epoch)) for epoch in epochs}) > 4
    for reader in all_readers:
        assert len(numbers(islice(reader.stream(), 50))) == 50
    seen = Counter(number for reader in all_readers for number in numbers(islice(reader.stream(), 20 * sum(sizes))))
    assert max(seen.values()) < 2 * min(seen.values())
    again = Reader(paths, "instance", 1, 3, 0, readers)
    assert numbers(islice(again.stream(), 50)) == numbers(islice(all_readers[0].stream(), 50))
    other = Reader(paths, "instance", 2, 3, 0, readers)
    assert numbers(islice(other.stream(), 50)) != numbers(islice(again.stream(), 50))


@pytest.mark.parametrize(("sizes", "readers"), [([4, 3, 5], 1), ([4, 3, 5], 2), ([5], 3)])
def test_skipping_lands_where_the_unbroken_stream_stands(tmp_path: Path, sizes: list[int], readers: int) -> None:
    paths = write_shards(tmp_path, sizes)
    for number in range(readers):
        unbroken = numbers(islice(Reader(paths, "instance", 1, 2, number, readers).stream(), 200))
        for skip in (1, 11, 12, 13, 150):
            reader = Reader(paths, "instance", 1, 2, number, readers)
            assert numbers(islice(reader.stream(skip), 50)) == unbroken[skip : skip + 50]
    far = Reader(paths, "instance", 1, 2)
    next(far.stream(10_000))
    assert far.read < 4 * sum(sizes)  # what is known is not read again


def stream(roles: list[Any], **more: Any) -> ShardStream:
    given = {"micro_batch_size": 2, "seed": 1, "resolution": 8, "center_crop": True, "random_flip": False, **more}
    return ShardStream(roles, **given)


def shard_role(name: str, paths: list[str], conds: Any = None) -> ShardRole:
    return ShardRole(name, f"a {name}", paths, 3, conds)


def test_a_batch_is_as_that_of_folders(tmp_path: Path, photos: Path) -> None:
    paths = write_shards(tmp_path / "i", [3, 2], captions=True)
    files = sorted(photos.iterdir())
    dogs = [f"dog {number}" for number in range(5)]
    roles = [shard_role("instance", paths), FolderRole("regularization", dogs, files, None)]
    batches = list(islice(stream(roles, accumulate=2, world=3, rank=1), 3))
    assert [batch["step"] for batch in batches] == [0, 0, 1]
    assert batches[1]["index"] == [8, 9, 20, 21]
    assert batches[1]["global_size"] == 12
    assert batches[1]["is_prior"].tolist() == [False, False, True, True]
    assert batches[1]["pixels"].shape == (4, 3, 8, 8)
    for batch in batches:
        for place, prompt, pixels in zip(batch["paths"][:2], batch["prompts"][:2], batch["pixels"][:2], strict=True):
            number = int(Path(place).stem)
            assert prompt == f"red {number}"
            assert torch.equal(pixels[0], torch.full((8, 8), number / 127.5 - 1))
        assert batch["prompts"][2:] == [f"dog {Path(place).stem}" for place in batch["paths"][2:]]
    assert "cond" not in batches[0]


def test_embeddings_are_those_of_the_prompts_and_captions_then_count_for_nothing(tmp_path: Path, photos: Path) -> None:
    paths = write_shards(tmp_path / "i", [3, 2], captions=True)
    known = {
        name: {"embeds": torch.full((1, 3), float(place))} for place, name in enumerate(("a instance", "a dog", ""))
    }
    roles = [
        shard_role("instance", paths, known),
        FolderRole("regularization", ["a dog"] * 5, sorted(photos.iterdir()), known),
    ]
    batch = next(iter(stream(roles)))
    assert batch["prompts"] == ["a instance"] * 2 + ["a dog"] * 2
    assert batch["cond"]["embeds"][:, 0].tolist() == [0, 0, 1, 1]
    dropped = list(islice(stream(roles, caption_dropout=0.5), 40))
    prompts = [prompt for batch in dropped for prompt in batch["prompts"]]
    assert 50 < prompts.count("") < 110
    embeds = [float(row[0]) for batch in dropped for row in batch["cond"]["embeds"]]
    assert all((value == 2) == (prompt == "") for value, prompt in zip(embeds, prompts, strict=True))


@pytest.mark.filterwarnings(FORK_WARNING)
@pytest.mark.parametrize(("sizes", "workers"), [([3, 2, 4], 0), ([3, 2, 4], 2), ([5], 2)])
def test_a_resumed_stream_goes_on_at_the_same_picture(tmp_path: Path, sizes: list[int], workers: int) -> None:
    roles = [shard_role("instance", write_shards(tmp_path, sizes))]

    def batches(rank: int, first_step: int, number: int) -> list[list[str]]:
        one = stream(roles, world=2, rank=rank, accumulate=2, first_step=first_step)
        return [batch["paths"] for batch in islice(DataLoader(one, batch_size=None, num_workers=workers), number)]

    for rank in range(2):
        unbroken = batches(rank, 0, 20)
        for first_step in (1, 5):
            assert batches(rank, first_step, 10) == unbroken[2 * first_step :][:10]


@pytest.mark.filterwarnings(FORK_WARNING)
@pytest.mark.parametrize("fault", ["picture", "shard"])
def test_what_a_worker_says_of_its_shard_is_one_line_in_the_run_too(tmp_path: Path, fault: str) -> None:
    path = write_tar(tmp_path / "s.tar", {"a.jpg": b"junk"})
    if fault == "shard":
        path.write_bytes(Path(write_shards(tmp_path / "whole", [3])[0]).read_bytes()[:700])
    loader = DataLoader(stream([shard_role("instance", [str(path)])]), batch_size=None, num_workers=1)
    words = "a.jpg cannot be read" if fault == "picture" else " cannot be read to its end"
    with pytest.raises(UserError, match=rf"^(shard )?{path}/?{words} [^\n]*$"):
        next(iter(loader))


@pytest.fixture(scope="module")
def tiny(tiny_sd: Path) -> StableDiffusion:
    return StableDiffusion(str(tiny_sd))


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What we say, among what Lightning does."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("dreambooth")]


def data(family: StableDiffusion, photos: Path, **changes: Any) -> ShardedDataModule:
    given: dict[str, Any] = {
        "instance_prompt": "a photo of a sks dog",
        "regularization_dir": str(photos.parent / "reg"),
        "regularization_prompt": "a photo of a dog",
        "sampler": SAMPLER,
        "num_reg_images": 6,
        "resolution": 32,
        "seed": 1,
        **changes,
    }
    module = ShardedDataModule(family, **given)
    module.trainer = trainer()
    return module


@pytest.mark.exhaustive
def test_either_set_may_be_in_shards_and_the_other_in_its_folder(
    tiny: StableDiffusion, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = write_shards(photos.parent / "shards", [3, 2])
    module = data(tiny, photos, instance_shards=f"{photos.parent}/shards/*.tar")
    with caplog.at_level(logging.INFO, "dreambooth"):
        module.setup("fit")
    assert said(caplog) == [
        "2 instance shards without captions; each step encodes its pictures",
        "model.use_cached_latents=true counts for folders, not beside shards",
    ]
    batch = next(iter(module.train_dataloader()))
    assert [Path(place).parent.name.strip("01") for place in batch["paths"]] == [".tar", "reg"]
    assert batch["cond"]["prompt_embeds"].shape[0] == 2
    assert module.counts["regularization_generated"] == 6
    assert module.epoch_size == 5
    assert sorted(os.listdir(photos.parent)) == ["photos", "reg", "shards"]  # nothing is cached
    reverse = data(tiny, photos, instance_dir=str(photos), regularization_shards=paths)
    reverse.setup("fit")
    assert reverse.epoch_size == 5
    assert {Path(place).parent.name for place in next(iter(reverse.train_dataloader()))["paths"]} <= {
        "photos",
        "00.tar",
        "01.tar",
    }
    captioned = write_shards(photos.parent / "captioned", [3], captions=True)
    with_captions = data(tiny, photos, instance_shards=captioned, regularization_shards=paths)
    with_captions.setup("fit")
    batch = next(iter(with_captions.train_dataloader()))
    assert "cond" not in batch
    assert batch["prompts"][0].startswith("red ")
    assert batch["prompts"][1] == "a photo of a dog"
    with pytest.raises(UserError, match="no shards are named; type model"):
        data(tiny, photos).check()
    with pytest.raises(UserError, match=r"neither .*_shards nor .*_dir is set"):
        data(tiny, photos, regularization_shards=paths).check()


@pytest.mark.slow
@pytest.mark.parametrize("captions", [True, False])
def test_dropped_prompts_are_empty_in_either_role(tiny: StableDiffusion, photos: Path, captions: bool) -> None:
    """As often as the key says; where prompts are encoded once, with the embedding of the empty one."""
    paths = write_shards(photos.parent / "shards", [3, 2], captions=captions)
    module = data(tiny, photos, instance_shards=paths, caption_dropout=0.3, micro_batch_size=2)
    module.setup("fit")
    batches = list(islice(module.train_dataloader(), 100))
    for half in (slice(0, 2), slice(2, 4)):
        dropped = [prompt == "" for batch in batches for prompt in batch["prompts"][half]]
        assert 40 < sum(dropped) < 90  # of 200
    assert all(("cond" in batch) != captions for batch in batches)
    known = {} if captions else {prompt: tiny.encode_prompts([prompt]) for prompt in set(batches[0]["prompts"]) | {""}}
    for batch in batches if known else ():
        for row, prompt in enumerate(batch["prompts"]):
            assert prompt not in known or torch.equal(
                batch["cond"]["prompt_embeds"][row], known[prompt]["prompt_embeds"][0]
            )


TWO = [
    {"instance_dir": word, "instance_prompt": f"a {word} dog", "regularization_prompt": "a dog"}
    for word in ("sks", "zwx")
]


@pytest.mark.parametrize(
    ("key", "value"),
    [("subjects", TWO), ("buckets", True), ("masks", "alpha"), ("captions", "sidecar"), ("prior", "teacher")],
)
def test_what_shards_cannot_do_is_one_line(tiny: StableDiffusion, photos: Path, key: str, value: Any) -> None:
    paths = write_shards(photos.parent / "shards", [3])
    with pytest.raises(UserError, match=rf"^model\.(data\.)?{key}\b.*shards") as caught:
        data(tiny, photos, instance_shards=paths, **{key: value}).check()
    assert "\n" not in str(caught.value)


def test_another_number_of_readers_is_said(tiny: StableDiffusion, photos: Path, caplog: Any) -> None:
    module = data(tiny, photos, instance_shards=write_shards(photos.parent / "shards", [3]), num_workers=2)
    module.load_state_dict({"readers": 2})
    assert not said(caplog)
    module.load_state_dict({"readers": 8})
    assert "8 readers (ranks x model.data.num_workers) shared the shards, now 2 do" in said(caplog)[0]


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ((1, 2, 1, 2), (1, 2, 2, 1), False),
        ((1, 2, 2, 2), (1, 2, 1, 4), False),
        ((2, 1, 2, 1), (1, 2, 2, 2), True),  # each reader has its two pictures of each step, in the same places
        ((1, 1, 1, 2), (1, 1, 2, 1), True),
    ],
)
def test_another_division_of_the_batch_is_said_where_the_order_changes(
    before: tuple[int, ...],
    now: tuple[int, ...],
    same: bool,
    tmp_path: Path,
    tiny: StableDiffusion,
    photos: Path,
    caplog: Any,
    monkeypatch: Any,
) -> None:
    """Ranks, workers, micro-batch size and accumulation; the line is as true as what the streams yield."""
    names = ("world", "workers", "micro_batch_size", "accumulate")
    paths = write_shards(tmp_path / "many", [5, 3, 4])

    def order(world: int, workers: int, size: int, accumulate: int) -> list[str]:
        """The pictures of eight steps, by step and place."""
        placed = {}
        for rank, own in product(range(world), range(workers)):
            worker = SimpleNamespace(id=own, num_workers=workers)
            monkeypatch.setattr(streaming, "get_worker_info", lambda worker=worker: worker)
            more = {"world": world, "rank": rank, "micro_batch_size": size, "accumulate": accumulate}
            for batch in takewhile(lambda batch: batch["step"] < 8, stream([shard_role("instance", paths)], **more)):
                placed |= {(batch["step"], *at): path for *at, path in zip(batch["index"], batch["paths"], strict=True)}
        return [placed[place] for place in sorted(placed)]

    assert (order(*before) == order(*now)) == same
    world, workers, size, accumulate = now
    module = data(tiny, photos, instance_shards=paths, num_workers=workers, micro_batch_size=size)
    module.trainer = SimpleNamespace(world_size=world, accumulate_grad_batches=accumulate)
    module.load_state_dict({"readers": before[0] * before[1], "shares": dict(zip(names, before, strict=True))})
    assert len(said(caplog)) == (not same)
    assert all("come in another order" in line for line in said(caplog))
    assert module.state_dict()["shares"] == dict(zip(names, now, strict=True))


def test_folders_become_shards_whose_bytes_depend_on_nothing_else(photos: Path, tmp_path: Path) -> None:
    (photos / "0.txt").write_text("a dog on a gradient")
    more = shutil.copytree(photos, tmp_path / "more")
    os.utime(more / "0.png", (0, 0))

    cfg = compose(["task=shard", f"shard.folders=[{photos},{more}]"])

    def make(name: str, size: int = 1000, seed: int = 1234) -> Path:
        own = {"seed": seed, "shard": {"out_path": str(tmp_path / name), "pictures_per_shard": size}}
        return shard(OmegaConf.merge(cfg, own))

    one = make("one", 4)
    assert sorted(os.listdir(one)) == ["000000.tar", "000001.tar", "000002.tar"]
    os.utime(photos / "1.jpg", (7, 7))
    two = make("two", 4)
    assert [path.read_bytes() for path in sorted(one.iterdir())] == [p.read_bytes() for p in sorted(two.iterdir())]
    assert (make("three", seed=2) / "000000.tar").read_bytes() != (make("four") / "000000.tar").read_bytes()
    found = [picture for path in sorted(one.iterdir()) for picture in pictures(str(path))]
    files = [path for folder in (photos, more) for path in folder.iterdir() if path.suffix != ".txt"]
    assert Counter(picture.data for picture in found) == Counter(path.read_bytes() for path in files)
    assert [picture.caption for picture in found].count("a dog on a gradient") == 2
    with pytest.raises(UserError, match="exists; type another shard"):
        make("one")
    (more / "1.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"shard.folders: 1 of 5 pictures cannot be read"):
        make("five")
    assert not (tmp_path / "five").exists()
    with pytest.raises(UserError, match=r"shard.out_path is not set"):
        shard(cfg)


RUN = """task=train model=pocket model/data=webdataset trainer.accelerator=cpu model.data.num_reg_images=2
model.data.sampler.inference_steps=2 model.micro_batch_size=1 callbacks/evaluate=none callbacks.sample_grid=null
callbacks.report=null callbacks.checkpoint.every_n_train_steps=2 logger=none"""


@pytest.mark.slow
@pytest.mark.filterwarnings(FORK_WARNING)
def test_a_run_on_shards_stops_and_goes_on_as_if_unbroken(tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "shards", [3, 2])

    def run(folder: str, steps: int, workers: int = 2) -> dict[str, torch.Tensor]:
        own = [f"trainer.max_steps={steps}", f"hydra.run.dir={folder}", f"model.data.num_workers={workers}"]
        done = train(compose([*RUN.split(), "model.data.instance_shards=shards/*.tar", *own]))
        checkpoint = max((done.folder / "checkpoints").glob("*.ckpt"))
        return read(checkpoint, "weights/")

    unbroken = run("unbroken", 6)
    run("broken", 2)
    with caplog.at_level(logging.INFO, "dreambooth"):
        resumed = run("broken", 6)
        assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
        run("broken", 7, workers=0)
    assert any("2 readers" in line and "now 1 do" in line for line in caplog.messages)
    assert any("instance shards: 6 pictures skipped" in line for line in caplog.messages)


@pytest.mark.exhaustive
def test_ranks_with_unequal_shares_wait_for_nobody(tmp_path: Path) -> None:
    """Two processes over gloo, each with a shard of its own, of 3 and of 2 pictures: over the ends of all epochs."""
    write_shards(tmp_path / "shards", [3, 2])
    own = ["trainer.devices=2", "strategy=ddp", "trainer.max_steps=8", "model.data.num_workers=0", "hydra.run.dir=run"]
    words = [*RUN.split(), *own, "model.data.instance_shards=shards/*.tar"]
    command = [sys.executable, str(Path(__file__).parents[1] / "launch.py"), *words]
    env = os.environ | {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "x 2 ranks x" in done.stdout + done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["num_shards"]) == (8, {"instance": 2})
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 9


MEMORY = """
import resource, sys
from itertools import islice
from dreambooth.data.streaming import ShardRole, ShardStream
role = ShardRole("instance", "a dog", [sys.argv[1]], 256, None)
stream = iter(ShardStream([role], 4, 1, 16, True, False))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for batch in islice(stream, 500): pass
early = peak()
seen = sum(len(batch["paths"]) for batch in islice(stream, 25_000))
print(seen, round(early), round(peak()))
"""


@pytest.mark.exhaustive
def test_a_hundred_thousand_pictures_use_flat_memory(tmp_path: Path) -> None:
    content, path = png(200, 16), tmp_path / "large.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(100_000):
            info = tarfile.TarInfo(f"{number:06d}.png")
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
            tar.members.clear()
    done = subprocess.run([sys.executable, "-c", MEMORY, path], capture_output=True, text=True, check=True)
    seen, early, late = map(int, done.stdout.split())
    assert seen == 100_000
    assert late - early < 20  # MiB
