"""The error of a user's mistake. A leaf: it imports nothing of this project."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake that the user can fix. Shown as one line: the value, the rule, the fix.

    It is no ValueError, so that no `except ValueError` takes a finished message for the reason of another one.
    """


@contextmanager
def refuse(start: str = "") -> Iterator[None]:
    """Turn a ValueError of the block into a UserError that begins with `start`, which says where; also a UserError.

    Call no code that users write in the block, except for the validation of settings: a bug must keep its traceback.
    """
    try:
        yield
    except (ValueError, UserError) as error:
        raise UserError(start + one_line(error)) from error


def one_line(error: BaseException | str) -> str:
    """Return the message of an error in one line of printable characters: it may quote a stranger's file."""
    return "".join(char if char.isprintable() else " " for char in str(error)[:1000])
