"""Durable files: flushed to the disk, hashed, and put in place by a rename."""

import hashlib
import os
import shutil
from pathlib import Path


def write_durably(path: Path, content: str) -> None:
    """Write text as UTF-8 and flush it to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def flush(path: Path) -> None:
    """Flush a file's contents, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def put_in_place(folder: Path, final: Path) -> None:
    """Rename ``folder`` to ``final``, its sibling.

    An older ``final`` is first renamed to ``.<name>.old`` and deleted last, so at every moment at least one complete
    folder is there under one of the two names (`recover` brings it back).
    """
    old = retired(final)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    folder.rename(final)
    flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def retired(final: Path) -> Path:
    """Where `put_in_place` keeps the previous ``final`` for a moment."""
    return final.with_name(f".{final.name.lstrip('.')}.old")


def recover(final: Path) -> None:
    """Undo a `put_in_place` that was killed between its two renames, or finish one killed after them."""
    old = retired(final)
    if not old.exists():
        return
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.rename(final)
        flush(final.parent)
