"""The error of a user's mistake, and notes. A leaf: it imports nothing of ours."""

import sys


class UserError(ValueError):
    """A mistake that the user can fix. Shown as one line: the value, the rule, the fix."""


def note(text: str) -> None:
    """Print a note to stderr: what the user may not expect, and need not fix."""
    print(f"note: {text}", file=sys.stderr)


def one_line(error: BaseException) -> str:
    """Return the message of an error in one line of printable characters: it may quote a stranger's file."""
    return "".join(char if char.isprintable() else " " for char in str(error)[:500])
