"""Reads the prompt column of .txt, .csv, .tsv, .json, .jsonl and .parquet files, row by row.

A reader yields ``(row label, value)``; a value that is None or "" is an empty prompt. Whether a value is a fit prompt
is for the caller to say.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastcraft.data.text_lines import MAX_LINE_BYTES, read_lines
from fastcraft.errors import MissingDependencyError, UserError

COLUMNS = ("prompt", "Prompt", "text", "caption")
"""Tried in this order when no column is named."""

Rows = Iterator[tuple[str, Any]]


def read_txt(path: Path, column: str, max_characters: int) -> Rows:
    """One prompt per line."""
    # A character takes at most 4 bytes; the rest is room for blanks at the ends.
    for number, line in read_lines(path, max_bytes=4 * max_characters + 1024):
        yield f"line {number}", line


def read_csv(path: Path, column: str, max_characters: int) -> Rows:
    """Comma-separated with a header; fields may be quoted, and then hold line ends."""
    yield from _read_separated(path, column, delimiter=",", quoting=csv.QUOTE_MINIMAL, strict=True)


def read_tsv(path: Path, column: str, max_characters: int) -> Rows:
    """Tab-separated with a header and no quoting, as PartiPrompts: a quote is a character like any other."""
    yield from _read_separated(path, column, delimiter="\t", quoting=csv.QUOTE_NONE)


def read_jsonl(path: Path, column: str, max_characters: int) -> Rows:
    """One string or object per line."""
    for number, line in read_lines(path):
        row = f"line {number}"
        if not line.strip():
            yield row, ""
            continue
        entry = _parse_json(line, path=path, first_line=number)
        value, column = _from_entry(entry, column, path=path, row=row)
        yield row, value


def read_json(path: Path, column: str, max_characters: int) -> Rows:
    """A list of strings or of objects; read whole."""
    # The whole list may well stand on one line.
    text = "\n".join(line for _, line in read_lines(path, max_bytes=max(path.stat().st_size, 1)))
    if not text.strip():
        return
    entries = _parse_json(text, path=path, first_line=1)
    if not isinstance(entries, list):
        raise UserError(f"prompts: {str(path)!r} must hold a list of strings or objects, got {_kind(entries)}")
    for number, entry in enumerate(entries, start=1):
        row = f"entry {number}"
        value, column = _from_entry(entry, column, path=path, row=row)
        yield row, value


def read_parquet(path: Path, column: str, max_characters: int) -> Rows:
    """A string column; needs pyarrow."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependencyError(
            f"prompts: {str(path)!r} needs the package pyarrow: pip install 'fastcraft[parquet]'"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            chosen = choose_column(file.schema_arrow.names, column, path=path)
            number = 0
            for batch in file.iter_batches(columns=[chosen], batch_size=8192):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield f"row {number}", value
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"prompts: {str(path)!r} is no readable parquet file: {reason}") from error


READERS: Mapping[str, Callable[[Path, str, int], Rows]] = {
    ".txt": read_txt,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}


def choose_column(names: Sequence[str], column: str, *, path: Path) -> str:
    """``column`` if it is there, or with ``""`` the first of `COLUMNS` that is.

    Raises:
        UserError: neither; the message names the columns found.
    """
    for name in (column,) if column else COLUMNS:
        if name in names:
            return name
    present = ", ".join(map(repr, names[:20])) or "none"
    if column:
        raise UserError(f"prompts: no column {column!r} in {str(path)!r}; columns found: {present}")
    raise UserError(f"prompts: name a column, for {str(path)!r} has none of {', '.join(COLUMNS)}; found: {present}")


def _read_separated(path: Path, column: str, **dialect: Any) -> Rows:
    previous_limit = csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader((line + "\n" for _, line in read_lines(path)), **dialect)
    try:
        header = next(reader, None)
        if header is None:
            return
        chosen = choose_column([name.strip() for name in header], column, path=path)
        index = [name.strip() for name in header].index(chosen)
        first = reader.line_num + 1
        for fields in reader:
            row, first = f"line {first}", reader.line_num + 1
            if fields and index >= len(fields):
                raise UserError(
                    f"prompts: {str(path)!r} {row}: column {chosen!r} is number {index + 1}, got {len(fields)} fields"
                )
            yield row, fields[index] if fields else ""
    except csv.Error as error:
        raise UserError(f"prompts: {str(path)!r} line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(previous_limit)


def _parse_json(text: str, *, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"prompts: {str(path)!r} line {line} column {error.colno}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nesting without end
        raise UserError(f"prompts: {str(path)!r} line {first_line}: not JSON that can be read: {error}") from error


def _from_entry(entry: Any, column: str, *, path: Path, row: str) -> tuple[Any, str]:
    """The prompt of a string or object, and the key that holds it from now on."""
    if not isinstance(entry, dict):
        return entry, column
    try:
        column = choose_column(list(entry), column, path=path)
    except UserError as error:
        raise UserError(f"{error} ({row})") from error
    return entry[column], column


def _kind(value: Any) -> str:
    return {dict: "an object", str: "a string", type(None): "null"}.get(type(value), f"{value!r:.40}")
