"""``task=shard``: folders of pictures as tar shards."""

import logging
import tarfile
from pathlib import Path

import torch
from omegaconf import DictConfig

from dreambooth.data import checks
from dreambooth.errors import UserError
from dreambooth.files import atomic, list_pictures
from dreambooth.noise import generator
from dreambooth.progress import progress_bar
from dreambooth.run_folder import is_rank_zero

log = logging.getLogger(__name__)

KEY, OUT = "shard.folders", "shard.out_path"


def shard(cfg: DictConfig) -> Path:
    """Write ``shard.out_path``, all of it or nothing; returns it.

    The pictures of all folders are permuted, so that each shard has some of each, and copied byte for byte under
    numbers. Raises UserError when a folder has no picture or an unreadable one, or the output exists.
    """
    for key, value in ((KEY, cfg.shard.folders), (OUT, cfg.shard.out_path)):
        if not value:
            raise UserError(f"{key} is not set; type {key}=FOLDER")
    given, out = cfg.shard.folders, Path(cfg.shard.out_path).expanduser()
    folders = [Path(each).expanduser() for each in ([given] if isinstance(given, str) else given)]
    if out.exists():
        raise UserError(f"{OUT}: {out} exists; type another {OUT}=..., or remove it")
    checks.writable(out, OUT)
    paths = [path for folder in folders for path in with_captions(folder)]
    if not is_rank_zero():
        return out
    order = torch.randperm(len(paths), generator=generator(cfg.seed, "shard")).tolist()
    size = cfg.shard.pictures_per_shard
    with progress_bar(len(paths), "writing shards", "picture") as bar, atomic(out) as temporary:
        temporary.mkdir()
        for first in range(0, len(paths), size):
            with tarfile.open(temporary / f"{first // size:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
                for number in range(first, min(first + size, len(paths))):
                    add_picture(tar, paths[order[number]], f"{number:09d}")
                    bar.update()
    log.info("%d pictures: model/data=webdataset model.data.instance_shards='%s/*.tar'", len(paths), out)
    return out


def with_captions(folder: Path) -> list[Path]:
    """The pictures of a folder; what may be a caption is not reported as a strange file."""
    return list_pictures(folder, KEY, known=[path.name for path in folder.glob("*.txt")])


def add_picture(tar: tarfile.TarFile, path: Path, key: str) -> None:
    """Append a picture and its caption, with nothing of the file but its bytes."""
    for member in (path, path.with_suffix(".txt")):
        if member == path or member.is_file():
            info = tarfile.TarInfo(key + member.suffix.lower())
            info.size = member.stat().st_size
            with member.open("rb") as file:
                tar.addfile(info, file)
