"""Which prompt belongs to which picture: by the name in a column ``file``, or by the order of the rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcraft.commands.pictures import few
from fastcraft.errors import UserError

FILE = "file"
"""Column or key with the name of the picture, as ``fastcraft score --csv`` writes it."""
_MAX_CHARACTERS = 4000


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A row of the prompt file."""

    where: str
    """Its line, for messages."""
    prompt: str
    """Cleaned; may be empty."""
    file: str = ""
    """Name of its picture, or empty."""


def prompts_of(path: str, names: Sequence[str], *, column: str = "", others: str = "") -> tuple[list[str], list[str]]:
    """The prompt of each picture, and what the person at the terminal should know.

    Args:
        path: the prompt file; see `load_prompts`. Its rows pair with pictures by name if it has a column ``file``, else
            by their order, where an empty row is the empty prompt of its picture; only empty rows at the end that are
            more than the pictures do not count.
        names: of the pictures, in order.
        column: see `load_prompts`.
        others: files in the folder that are not read as pictures, for the message about wrong numbers.

    Raises:
        UserError: a file that cannot be read, another number of rows than pictures, or a name that is missing, not in
            the folder or there twice.
    """
    rows, by_name = _rows(path, column)
    if by_name:
        rows = _sorted_by_name(path, rows, names)
    while len(rows) > len(names) and not rows[-1].prompt:
        rows.pop()
    if len(rows) != len(names):
        hint = f"; no pictures by their names, so not read: {others}" if others else ""
        raise UserError(f"--prompts: one for each of the {len(names)} pictures is needed, got {_count(rows)}{hint}")
    notes = [] if all(row.prompt for row in rows) else [f"--prompts: {_count(rows)}"]
    return [row.prompt for row in rows], notes


def _rows(path: str, column: str) -> tuple[list[Row], bool]:
    """Every row, empty ones too, and whether they name their pictures."""
    from fastcraft.data.clean import clean_prompt
    from fastcraft.data.prompts import load_prompts

    load_prompts(path, column=column)  # refuses whatever cannot be read
    values = list(_values(path, column))
    files = _files(path, [value or "" for _, value in values]) if column != FILE else []
    rows = []
    for (where, value), file in zip(values, files or [""] * len(values), strict=True):
        prompt, _ = clean_prompt(value or "", where=f"prompts: {path!r} {where}", max_characters=_MAX_CHARACTERS)
        rows.append(Row(where=where, prompt=prompt, file=file.strip()))
    return rows, bool(files)


def _values(path: str, column: str) -> Iterator[tuple[str, Any]]:
    """Every row's line and value, as it stands in the file."""
    from fastcraft.data.tables import READERS

    return READERS[Path(path).suffix.lower()](Path(path), column, _MAX_CHARACTERS)


def _files(path: str, prompts: Sequence[str]) -> list[str]:
    """The column of names, or nothing where there is none: then it is missing, or is the prompts of a plain list."""
    files: list[str] = []
    try:
        for where, value in _values(path, FILE):
            if value is not None and not isinstance(value, str):
                raise UserError(f"--prompts: {path!r} {where}: {FILE!r} must name a picture, got {value!r:.60}")
            files.append(value or "")
    except UserError as error:
        if files != prompts[: len(files)] or not str(error).startswith(f"prompts: no column {FILE!r}"):
            raise
        return []
    return files if files != prompts else []


def _sorted_by_name(path: str, rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """One row for each picture, in the order of ``names``."""
    place, known, by_file = f"--prompts: {path!r}", set(names), dict[str, Row]()
    for row in rows:
        if not row.file and not row.prompt:
            continue
        if not row.file:
            raise UserError(f"{place} {row.where}: {FILE!r} must name a picture, got nothing")
        if row.file not in known:
            raise UserError(f"{place} {row.where}: {FILE!r} must name a picture in --images, got {row.file!r}")
        if row.file in by_file:
            raise UserError(
                f"{place} {row.where}: each picture once, got {row.file!r} in {by_file[row.file].where} too"
            )
        by_file[row.file] = row
    missing = [name for name in names if name not in by_file]
    if missing:
        raise UserError(f"{place}: every picture in --images needs a row, and there is none for {few(missing)}")
    return [by_file[name] for name in names]


def _count(rows: Sequence[Row]) -> str:
    """How many, and which of them are empty."""
    empty = [row.where for row in rows if not row.prompt]
    return f"{len(rows)}" + (f", {len(empty)} of them empty: {few(empty)}" if empty else "")
