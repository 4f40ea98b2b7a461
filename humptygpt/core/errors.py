"""The error of a user's mistake. A leaf: it imports nothing."""


class UserError(ValueError):
    """A mistake that the user can fix. Shown as one line: the value, the rule, the fix."""


def one_line(error: BaseException | str) -> str:
    """Return the message of an error in one line of printable characters: it may quote a stranger's file."""
    return "".join(char if char.isprintable() else " " for char in str(error)[:1000])
