"""Errors whose message is meant for the person at the terminal: one line, exit status 2, no traceback."""

import argparse
import contextlib
from collections.abc import Iterator
from typing import NoReturn


class UserError(ValueError):
    """Bad input: the message names the argument, the rule and the value received."""


@contextlib.contextmanager
def named(prefix: str) -> Iterator[None]:
    """Put ``prefix``, a recipe's key or a flag, before the message of a `UserError` from inside."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{prefix}{error}") from error


class MissingDependencyError(UserError):
    """An optional package is needed; the message names the package and the extra that installs it."""


class CommandLine(argparse.ArgumentParser):
    """A parser whose errors are one line too, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Exit status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")
