"""Errors whose message is meant for the person at the terminal: one line, exit status 2, no traceback."""


class UserError(ValueError):
    """Bad input: the message names the argument, the rule and the value received."""


class MissingDependencyError(UserError):
    """An optional package is needed; the message names the package and the extra that installs it."""
