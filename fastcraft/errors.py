"""Errors whose message is meant for the person at the terminal: one line, exit status 2, no traceback."""

import argparse
from typing import NoReturn


class UserError(ValueError):
    """Bad input: the message names the argument, the rule and the value received."""


class MissingDependencyError(UserError):
    """An optional package is needed; the message names the package and the extra that installs it."""


class CommandLine(argparse.ArgumentParser):
    """A parser whose errors are one line too, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Exit status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")
