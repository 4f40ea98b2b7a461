"""The error of a user's mistake. A leaf: it imports nothing."""


class UserError(ValueError):
    """A mistake that the user can fix. Shown as one line: the value, the rule, the fix."""
