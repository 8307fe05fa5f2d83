"""Files that are whole or absent: written beside their place, then renamed onto it."""

import json
import os
from pathlib import Path
from typing import Any


def write_bytes(path: Path, data: bytes) -> Path:
    """Replace ``path`` by ``data``; after a kill it is the old file or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_text(path: Path, text: str) -> Path:
    """UTF-8; lone surrogates, which have no encoding, become ``?``."""
    return write_bytes(path, text.encode("utf-8", errors="replace"))


def write_json(path: Path, tree: Any) -> Path:
    """ASCII JSON, indented; floats must be finite."""
    return write_text(path, json.dumps(tree, indent=2, allow_nan=False) + "\n")
