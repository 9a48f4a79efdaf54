"""While the ranks fill folders together: one that is gone ends the others at once, in a line that names it.

A barrier tells nobody of a rank that died while the others still draw, and NCCL's waits for half an hour. A connection
does: the system closes it when the process at its other end is gone, and keeps it however slow that process is. So each
rank holds one to the first, which passes on what it hears.
"""

import faulthandler
import logging
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl

from dreambooth import slurm
from dreambooth.errors import UserError
from dreambooth.parallel.patience import wait_long

log = logging.getLogger(__name__)

LOGS = "ranks"  # in the run folder, for as long as the ranks are watched
CONNECT = 30.0  # seconds
REQUEUE = 75  # in the place of an exit code: the job is to go on later, and the first rank has to ask for it
GRACE = {
    130: 30.0,
    143: 30.0,
    REQUEUE: 0.0,
}  # a rank that was told to stop: the others were, too, and end by themselves
# After so many seconds without an answer a machine is gone; an idle connection's own limit is two hours.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}


class Peer(NamedTuple):
    """The rank at the other end: how to speak of it, and where its log is."""

    rank: int
    name: str
    log: str


def watched(setup: Callable[..., None]) -> Callable[..., None]:
    """A data module's ``setup`` in which no rank outlives another by more than a minute, nor gives up a slow one."""

    @wraps(setup)
    def inner(self: Any, *arguments: Any, **more: Any) -> None:
        wait_long(self.trainer)
        with watching(self.trainer):
            setup(self, *arguments, **more)

    return inner


@contextmanager
def watching(trainer: pl.Trainer) -> Iterator[None]:
    """Within, a rank that ends ends the others; all ranks enter together.

    A rank that fails by itself leaves with its own exception. ``<default_root_dir>/ranks/rank_R.log`` says why it did,
    and goes when all went well.
    """
    if trainer.world_size == 1:
        yield
        return
    watch = Watch(trainer)
    try:
        yield
    except BaseException as error:
        watch.fail(error)
        raise
    watch.say(0, "")
    watch.close_log()


class Watch:
    """This rank's connections: of the first to all others, of another to the first."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self.rank, self.world, strategy = trainer.global_rank, trainer.world_size, trainer.strategy
        self.launched = list(getattr(strategy.launcher, "procs", ()))
        self.speaks = trainer.local_rank == 0
        self.log = Path(trainer.default_root_dir).absolute() / LOGS / f"rank_{self.rank}.log"
        me = f"rank {self.rank} ({socket.gethostname()}, process {os.getpid()})"
        self.me = Peer(self.rank, me, str(self.log))
        self.open_log()
        self.over, self.heard, self.peers = False, False, selectors.DefaultSelector()
        server = listen() if self.rank == 0 else None
        mine: Any = (server.getsockname()[1] if server else 0, secrets.token_hex(16), tuple(self.me))
        port, token, first = strategy.broadcast(mine)
        try:
            if server:
                self.accept(server, token)
            else:
                environment: Any = getattr(strategy, "cluster_environment", None)
                self.connect(environment.main_address, port, token, Peer(*first))
        except OSError as error:
            log.warning("%s is not watched, so others may wait for it if it dies: %s", me, error)
        threading.Thread(target=self.listen, daemon=True).start()

    def open_log(self) -> None:
        """Begin the log of this rank; a fault of the interpreter is written there, too."""
        for last in (False, False, False, True):
            try:
                self.log.parent.mkdir(parents=True, exist_ok=True)
                self.log.write_text(f"{self.me.name} began at {time.strftime('%F %T')}\n")
                break
            except (FileNotFoundError, FileExistsError):  # another rank, through with its last work, removes the folder
                if last:
                    raise
        self.tells_faults = not faulthandler.is_enabled()
        if self.tells_faults:
            faulthandler.enable(self.log.open("a"))

    def close_log(self) -> None:
        """Remove the log of a rank that has nothing to say."""
        if self.tells_faults:
            faulthandler.disable()
        self.log.unlink(missing_ok=True)
        with suppress(OSError):  # another rank's is there
            self.log.parent.rmdir()

    def accept(self, server: socket.socket, token: str) -> None:
        """Take a connection of every other rank."""
        server.settimeout(CONNECT)
        with server:
            while len(self.peers.get_map()) < self.world - 1:
                connection = server.accept()[0]
                connection.settimeout(CONNECT)
                given, _, about = (read(connection) or "").partition("\t")
                if given == token:
                    rank, name, path = about.split("\t")
                    self.hold(connection, Peer(int(rank), name, path))

    def connect(self, address: str, port: int, token: str, first: Peer) -> None:
        """Connect to the first rank."""
        connection = socket.create_connection((address, port), CONNECT)
        connection.sendall(("\t".join([token, *map(str, self.me)]) + "\n").encode())
        self.hold(connection, first)

    def hold(self, connection: socket.socket, peer: Peer) -> None:
        """Keep a connection, and let the system ask the other machine whether it is there."""
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.peers.register(connection, selectors.EVENT_READ, peer)

    def say(self, code: int, line: str) -> None:
        """Tell the others that this rank has ended, or that they must: an exit code, 0 for what went well."""
        self.over = True
        for key in list(self.peers.get_map().values()):
            with suppress(OSError):
                key.fileobj.sendall(f"{code} {line}\n".encode())  # type: ignore[union-attr]

    def fail(self, error: BaseException) -> None:
        """Write down why this rank fails, and tell the others."""
        if not isinstance(error, UserError | SystemExit | KeyboardInterrupt):
            time.sleep(2)  # perhaps another's end broke a collective: then ``listen`` has the reason, and ends this
            while self.heard:
                time.sleep(1)
        told = {KeyboardInterrupt: 130, UserError: 2}.get(type(error), 1)
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else told
        code = REQUEUE if isinstance(error, slurm.Requeued) else code
        with suppress(OSError), self.log.open("a") as file:
            file.write("".join(traceback.format_exception(error)))
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        self.say(code or 1, f"{self.me.name} ended with {why}; its log is {self.log}")
        if code == REQUEUE and self.rank:
            time.sleep(slurm.PATIENCE)  # the first rank may wait for this one where no signal reaches it: it asks now

    def listen(self) -> None:
        """Wait for what the others say, or for their end, until this rank is through."""
        while not self.over:
            for key, _ in self.peers.select(1):
                peer: Peer = key.data
                connection: Any = key.fileobj
                text = read(connection)
                if self.over:
                    break
                code, _, line = (f"1 {self.lost(peer)}" if text is None else text).partition(" ")
                if code != "0":
                    self.heard = True
                    # What a rank could still say of itself may have happened here, too.
                    time.sleep(GRACE.get(int(code), 5.0) if text else 0)
                    self.end(int(code), line)
                self.peers.unregister(connection)
                connection.close()

    def lost(self, peer: Peer) -> str:
        """What there is to say of a rank that is gone without a word."""
        how, self.speaks = "is gone without a word", self.speaks or self.rank == 1
        if 1 <= peer.rank <= len(self.launched):
            with suppress(subprocess.TimeoutExpired):
                code = self.launched[peer.rank - 1].wait(2)
                how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        if self.speaks:
            with suppress(OSError), Path(peer.log).open("a") as file:
                file.write(f"{how}: out of memory, or ended from outside\n")
        return f"{peer.name} {how}; its log is {peer.log}"

    def end(self, code: int, line: str) -> None:
        """End this process at once, even in a collective: every file is whole at every moment."""
        if self.over:
            return
        if code == REQUEUE:
            if self.rank == 0:
                slurm.requeue()
        elif self.speaks:
            text = f"dreambooth: {line}; the same command goes on with the files that are there"
            print(text, file=sys.stderr, flush=True)
        self.say(code, line)
        sys.stdout.flush()
        os._exit(143 if code == REQUEUE else code)


def listen() -> socket.socket:
    """A socket at a free port, of all addresses of this machine."""
    if socket.has_dualstack_ipv6():
        with suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def read(connection: socket.socket) -> str | None:
    """A line, and nothing of what follows it; None when the other end is gone."""
    parts = b""
    while not parts.endswith(b"\n"):
        try:
            part = connection.recv(1)
        except OSError:
            return None
        if not part:
            return None
        parts += part
    return parts.decode().rstrip("\n")
