"""The one way in which a file or a folder is written: whole or not at all, flushed to the disk, readable as umask says.

A file is written beside its place and renamed onto it; a folder is filled beside its place and renamed. After a kill at
any moment the old content or the new one is there, never half of either.
"""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


def write_bytes(path: Path, data: bytes) -> Path:
    """Replace the file ``path`` by ``data``; folders above it are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = draft_of(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def draft_of(path: Path) -> Path:
    """Where this process writes a file before it is renamed to ``path``; one that a kill left behind means nothing."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def write_text(path: Path, text: str) -> Path:
    """UTF-8; lone surrogates, which have no encoding, become ``?``."""
    return write_bytes(path, text.encode("utf-8", errors="replace"))


def write_json(path: Path, tree: Any) -> Path:
    """ASCII JSON, indented; floats must be finite."""
    return write_text(path, json.dumps(tree, indent=2, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file of contiguous tensors.

    Raises:
        OSError: it cannot be written. safetensors itself wraps such errors in one of its own.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = draft_of(path)
    try:
        save_file(dict(tensors), temporary, metadata=dict(metadata) if metadata else None)
        _as_umask_says(temporary)  # safetensors lets nobody but its owner read it
        flush(temporary)
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path.name}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_folder(final: Path, fill: Callable[[Path], T]) -> T:
    """Let ``fill`` write into a folder beside ``final``, then rename it; on an error nothing is left of it.

    Returns:
        What ``fill`` returned.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    recover(final)
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        result = fill(temporary)
        for file in temporary.iterdir():
            _as_umask_says(file)
            flush(file)
        flush(temporary)
        put_in_place(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return result


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


def _as_umask_says(path: Path) -> None:
    """The mode that ``open`` would have given a new file; a file that may be executed stays so."""
    if not path.is_file():
        return
    umask = os.umask(0)
    os.umask(umask)
    mode = stat.S_IMODE(path.stat().st_mode)
    path.chmod((mode | 0o666) & ~umask)
