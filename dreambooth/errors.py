"""The one exception that is meant for the person at the keyboard."""


class UserError(Exception):
    """One line for the user: what is wrong, where (file or key), what to type instead."""
