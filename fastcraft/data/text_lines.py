"""Lines of a text file, read with bounded memory, each checked before it is used."""

import codecs
from collections.abc import Iterator
from pathlib import Path

from fastcraft.errors import UserError

MAX_LINE_BYTES = 1 << 24
"""16 MiB: no row of a prompt table is longer."""


def read_lines(path: Path, *, max_bytes: int = MAX_LINE_BYTES) -> Iterator[tuple[int, str]]:
    """``(line number from 1, line without its end)``; a byte order mark is dropped, LF and CRLF both end a line.

    Raises:
        UserError: a NUL byte or bytes that are not UTF-8 (a binary file), or a line over ``max_bytes``.
    """
    with path.open("rb") as file:
        number = 0
        while chunk := file.readline(max_bytes + 1):
            number += 1
            if number == 1:
                chunk = chunk.removeprefix(codecs.BOM_UTF8)
            yield number, _decoded(chunk.rstrip(b"\r\n"), path=path, number=number, max_bytes=max_bytes)


def _decoded(line: bytes, *, path: Path, number: int, max_bytes: int) -> str:
    where = f"prompts: {str(path)!r} line {number}"
    if b"\0" in line:
        raise UserError(f"{where}: a NUL byte; this is a binary file, not UTF-8 text")
    too_long = len(line) > max_bytes
    try:
        # Not final when cut short: the cut may fall inside a character.
        text = codecs.getincrementaldecoder("utf-8")().decode(line, final=not too_long)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: byte {error.start + 1} is not UTF-8; this is a binary file or another encoding"
        ) from error
    if too_long:
        raise UserError(f"{where}: longer than {max_bytes} bytes")
    return text
