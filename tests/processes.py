"""Real processes that need not import torch anew: forked, so that they can be killed in the middle."""

import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

FORK_WARNING = "ignore:.*fork.*:DeprecationWarning"


def start(target: Callable[..., object], *arguments: object) -> Any:
    """Run ``target(*arguments)`` in a child, at a lower priority, so that whoever kills it is in time."""
    process = multiprocessing.get_context("fork").Process(target=_begin, args=(target, *arguments), daemon=True)
    process.start()
    return process


def _begin(target: Callable[..., object], *arguments: object) -> None:
    tqdm.set_lock(threading.RLock())  # its own is shared with the parent: a killed child would keep it
    os.nice(10)
    target(*arguments)


def count(folder: Path) -> int:
    """How many whole pictures and cache files there are below a folder."""
    return sum(path.suffix in (".png", ".pt") for path in folder.rglob("[!.]*"))


def kill_after(more: int, folder: Path, target: Callable[..., object], *arguments: object) -> int:
    """Start ``target`` and kill it at a random moment after ``more`` new files; how many there are then."""
    enough = count(folder) + more
    process = start(target, *arguments)
    while count(folder) < enough and process.is_alive():
        time.sleep(random.uniform(0, 0.004))
    process.kill()
    process.join()
    return count(folder)
