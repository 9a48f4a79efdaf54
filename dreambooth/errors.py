"""The one exception that is meant for the person at the keyboard."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """One line for the user: what is wrong, where (file or key), what to type instead."""


@contextmanager
def about(key: str) -> Iterator[None]:
    """Put the key that was typed before what is wrong with its value."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
