"""Where ``fastcraft score`` writes: looked at before anything is scored, and written whole or not at all."""

import os
from collections.abc import Sequence
from pathlib import Path

from fastcraft.errors import UserError


def check_output(path: str, *, flag: str, others: Sequence[Path]) -> None:
    """Raise a `UserError` unless ``path`` can be written without harm.

    Args:
        path: as given.
        flag: whose value it is, for messages.
        others: files that are read, or written too.
    """
    file = Path(path)
    if not path or path.endswith(os.sep) or file.is_dir():
        raise UserError(f"{flag} must be a file, got {'the folder ' if path else ''}{path!r}")
    if not file.absolute().parent.is_dir():
        raise UserError(f"{flag}: the folder of {path!r} must exist")
    if any(file.resolve() == place.resolve() for place in others):
        raise UserError(f"{flag} must not be a file that is read or written too, got {path!r}")
    if not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
        raise UserError(f"{flag}: {path!r} must be writable")


def write_output(path: str, text: str, *, flag: str) -> None:
    """Replace the file by ``text`` as UTF-8; what is no regular file, a pipe for example, is written into.

    Raises:
        UserError: it cannot be written, as on a full disk.
    """
    from fastcraft.durable import write_text

    file = Path(path)
    try:
        if file.exists() and not file.is_file():
            file.write_text(text, encoding="utf-8", newline="")
        else:
            write_text(file.resolve(), text)
    except OSError as error:
        raise UserError(f"{flag}: {path!r} cannot be written: {error.strerror or error}") from error
