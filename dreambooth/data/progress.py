"""One kind of progress bar for every long step before training."""

import sys

from tqdm import tqdm


def progress_bar(total: int, description: str, unit: str, rank: int = 0) -> tqdm:
    """A bar with the time left, on the first rank only; in a log file a line every 15 seconds, none in the first 15."""
    interval, delay = (0.2, 0) if sys.stderr.isatty() else (15, 15)
    how = {"disable": rank != 0, "mininterval": interval, "delay": delay, "dynamic_ncols": True}
    return tqdm(total=total, desc=description, unit=unit, **how)
