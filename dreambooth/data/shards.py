"""Pictures in tar shards: which shards there are, and the pictures of one, read from its beginning to its end."""

import glob
import re
import signal
import tarfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from subprocess import TimeoutExpired
from typing import Any, BinaryIO

from braceexpand import braceexpand
from webdataset.gopen import gopen
from webdataset.tariterators import group_by_keys, tar_file_expander

from dreambooth.errors import UserError
from dreambooth.files import PICTURE_SUFFIXES

END = bytes(1024)  # two empty blocks end a tar
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # their own formats tell when they are cut short
FAULTS = (OSError, EOFError, ValueError, tarfile.TarError)


@dataclass(frozen=True)
class Picture:
    """A picture as its shard holds it: ``place`` is SHARD/MEMBER, ``caption`` the text beside it if there is any."""

    place: str
    data: bytes
    caption: str | None

    @property
    def file(self) -> BinaryIO:
        """The bytes, as an open file."""
        return BytesIO(self.data)


def remote(shard: str) -> bool:
    """Whether a shard is a command's output or a URL, which can only be read from its beginning."""
    return shard.startswith("pipe:") or "://" in shard


def expand(shards: str | Sequence[str], key: str) -> list[str]:
    """The shards that a path, glob, ``{000..009}``, ``pipe:COMMAND`` or URL means, or a list of these, in that order.

    Raises UserError, which names the config ``key``, when one of them matches no file.
    """
    found: list[str] = []
    for entry in [shards] if isinstance(shards, str) else shards:
        try:
            spelt = list(braceexpand(str(entry)))
        except ValueError:  # unbalanced ones, such as awk's in a command
            spelt = [str(entry)]
        for pattern in spelt:
            found += [pattern] if remote(pattern) else _files(pattern, key)
    if not found:
        raise UserError(f"{key} names no shard; type {key}='shards/*.tar'")
    return found


def _files(pattern: str, key: str) -> list[str]:
    path = Path(pattern).expanduser()
    files = [str(path)] if path.is_file() else sorted(filter(lambda each: Path(each).is_file(), glob.glob(str(path))))
    if not files:
        hint = f"; it is a folder: type {key}='{path}/*.tar'" if path.is_dir() else "; task=shard makes some"
        raise UserError(f"{key}: no shard matches {pattern}{hint}")
    return files


def inspect(shards: Sequence[str], key: str) -> bool:
    """Whether the pictures have captions: whether the first one of any shard does.

    Opens each shard on disk, and the first one of the others, since a command may be expensive. Raises UserError when
    one is cut short, holds no picture or cannot be read.
    """
    looked = [shard for shard in shards if not remote(shard)] + [shard for shard in shards if remote(shard)][:1]
    try:
        captions = [first(shard).caption for shard in looked]
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    return any(captions)


def first(shard: str) -> Picture:
    """The first picture of a shard; of a file, its end is looked at too."""
    with closing(pictures(shard)) as found:
        picture = next(found)
    if not remote(shard):
        with open(shard, "rb") as file:
            head = file.read(6)
            file.seek(-min(len(END), Path(shard).stat().st_size), 2)
            _check_end(shard, head, file.read())
    return picture


def _begin(shard: str) -> Any:
    """The output of a command, or of what loads a URL. A shell unblocks signals, but not those that it traps."""
    try:
        return gopen(re.sub("^pipe:", "pipe:trap '' INT TERM USR1 USR2; ", shard))
    except FileNotFoundError as error:
        if shard.startswith("file:"):
            raise
        raise UserError(
            f"shard {shard} is fetched by the program {error.filename}, which is not here: install it, or type "
            "'pipe:COMMAND' with one that is"
        ) from None


@contextmanager
def _unsignalled() -> Iterator[None]:
    """Within, commands begin that hear no signal but KILL: SLURM, torchrun and Ctrl-C send theirs to every process.

    They would end in the middle of a shard, while the process that reads them only takes note and goes on to the end of
    its step. They end with it, when nobody reads them. What comes meanwhile waits.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    signs = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signs)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def pictures(shard: str) -> Generator[Picture, None, None]:
    """The pictures of a shard in its order, one in memory at a time.

    A picture's members share their name but for what follows its last dot: one with a picture's suffix, and maybe
    ``.txt``. Raises UserError, which names the shard, when it cannot be read to its end or holds no picture.
    """
    stream = None
    count = 0
    try:
        with _unsignalled():
            stream = Tail(_begin(shard) if remote(shard) else open(shard, "rb"))  # noqa: SIM115 (closed below)
        for sample in group_by_keys(tar_file_expander([{"url": shard, "stream": stream}]), keys=_split):
            picture = _picture(shard, sample)
            if picture is not None:
                count += 1
                yield picture
        stream.finish()
        _check_end(shard, stream.head, stream.tail)
    except FAULTS as error:
        raise UserError(
            f"shard {shard} cannot be read to its end ({_reason(error, stream)}); {_remedy(shard)}"
        ) from None
    finally:
        if stream is not None:
            with suppress(*FAULTS):  # a command whose output nobody wants any more
                stream.file.close()
    if not count:
        raise UserError(f"shard {shard} holds no picture; its members must end with .jpg, .png or the like")


class Tail:
    """A stream that remembers its first and last bytes."""

    def __init__(self, file: Any) -> None:
        self.file, self.head, self.tail = file, b"", b""

    def read(self, size: int = -1) -> bytes:
        """As of any file."""
        data: bytes = self.file.read(size)
        self.head = self.head or data[:6]
        self.tail = (self.tail + data)[-len(END) :]
        return data

    def finish(self) -> None:
        """Read what follows the end mark, and have a command say how it ended."""
        while self.read(1 << 20):
            pass
        self.file.close()


def _split(name: str) -> tuple[str, str]:
    path = PurePosixPath(name)
    return str(path.with_suffix("")), path.suffix[1:]


def _picture(shard: str, sample: dict[str, Any]) -> Picture | None:
    found = [suffix for suffix in sample if f".{suffix}" in PICTURE_SUFFIXES]
    if not found:
        return None
    caption = sample["txt"].decode("utf-8", "replace").strip() if "txt" in sample else None
    return Picture(f"{shard}/{sample['__key__']}.{found[0]}", sample[found[0]], caption or None)


def _check_end(shard: str, head: bytes, tail: bytes) -> None:
    if tail != END and not head.startswith(COMPRESSED):
        raise UserError(f"shard {shard} is cut short: its end mark is missing; {_remedy(shard)}")


def _remedy(shard: str) -> str:
    return "run the command in a shell to see why" if shard.startswith("pipe:") else "copy or make it again"


def _reason(error: Exception, stream: Tail | None) -> str:
    """What went wrong; of a command, its exit status, which comes before what tarfile says of the output."""
    command = getattr(stream and stream.file, "proc", None)
    if command is not None:
        with suppress(TimeoutExpired):  # it goes on when only its output is at fault
            if status := command.wait(1):
                return f"exit {status}" + (", no such command" if status == 127 else "")
    return getattr(error, "strerror", None) or str(error.args[0] if error.args else error).partition(" @ ")[0]
