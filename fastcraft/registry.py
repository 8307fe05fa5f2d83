"""Lazy catalogues: a name maps to ``"module:attribute"``, imported only when asked for."""

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from fastcraft.errors import UserError


def suggestion(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest known name, or the list of names when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"


def resolve(path: str, what: str) -> Any:
    """Import ``"package.module:attribute"``.

    Raises:
        UserError: the path has no colon, the module cannot be imported, or the attribute is missing.
    """
    module_name, colon, attribute = path.partition(":")
    if not colon or not module_name or not attribute:
        raise UserError(f"{what}: expected 'package.module:name', got {path!r}")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{what}: cannot load {path!r}: {error}") from error


class Registry:
    """A catalogue of one kind of component.

    Args:
        what: singular noun for error messages, for example ``"reward"``.
        entries: name -> ``"module:attribute"``. Reading the catalogue imports nothing.
    """

    def __init__(self, what: str, entries: Mapping[str, str]) -> None:
        self.what = what
        self.entries = dict(entries)

    def names(self) -> list[str]:
        """Every registered name, sorted."""
        return sorted(self.entries)

    def get(self, name: str) -> Any:
        """The component called ``name``; a name with a colon is a user's own ``"module:attribute"``.

        Raises:
            UserError: no such name; the message suggests the nearest one.
        """
        if ":" in name:
            return resolve(name, self.what)
        if name not in self.entries:
            raise UserError(f"unknown {self.what} {name!r}{suggestion(name, self.entries)}")
        return resolve(self.entries[name], self.what)
