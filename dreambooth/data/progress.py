"""One kind of progress bar for every long step before training."""

import sys

from tqdm import tqdm


def progress_bar(total: int, description: str, unit: str, rank: int = 0) -> tqdm:
    """A bar with the time left, on the first rank only; in a log file a line every 15 seconds."""
    interval = 0.2 if sys.stderr.isatty() else 15
    return tqdm(total=total, desc=description, unit=unit, disable=rank != 0, mininterval=interval, dynamic_ncols=True)
