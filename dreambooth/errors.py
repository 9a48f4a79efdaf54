"""The one exception that is meant for the person at the keyboard."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """One line for the user: what is wrong, where (file or key), what to type instead."""

    def __init__(self, line: str) -> None:
        if line.startswith("Caught UserError in "):  # torch's copy of a loader worker's: a traceback that ends with it
            line = line.rpartition(f"\n{__name__}.UserError: ")[2].rstrip()
        super().__init__(line)


@contextmanager
def about(key: str) -> Iterator[None]:
    """Put the key that was typed before what is wrong with its value."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
