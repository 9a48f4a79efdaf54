"""One kind of progress bar for every long step beside training."""

import sys

from tqdm import tqdm


def progress_bar(total: int, description: str, unit: str, rank: int = 0) -> tqdm:
    """A bar with the time left, for two things or more, on the first rank; in a log file a line every 15 seconds."""
    interval, delay = (0.2, 0) if sys.stderr.isatty() else (15, 15)
    how = {"disable": rank != 0 or total < 2, "mininterval": interval, "delay": delay, "dynamic_ncols": True}
    return tqdm(total=total, desc=description, unit=unit, **how)
