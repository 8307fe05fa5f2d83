"""Prompt files: every format into one checked sequence of prompts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastcraft.data.clean import clean_prompt
from fastcraft.data.packed import PackedStrings
from fastcraft.data.tables import READERS
from fastcraft.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSource:
    """Prompts in the order of the file, and what happened on the way."""

    prompts: Sequence[str]
    """At least one, none empty, none with control characters or tokenizer marks."""
    path: str
    """The file."""
    num_empty: int = 0
    """Rows dropped because nothing but white space was in them."""
    num_duplicates: int = 0
    """Prompts that equal an earlier one; they are kept, for a repeated prompt is a weighted prompt."""
    num_neutralised: int = 0
    """Prompts in which a literal ``<|startoftext|>`` or ``<|endoftext|>`` was replaced by a space."""

    def __len__(self) -> int:
        return len(self.prompts)

    def summary(self) -> str:
        """One line for the person at the terminal."""
        counts = (
            (self.num_duplicates, "duplicates kept"),
            (self.num_empty, "empty lines dropped"),
            (self.num_neutralised, "cleared of tokenizer marks"),
        )
        notes = [f"{number} {what}" for number, what in counts if number]
        return f"{len(self)} prompts from {self.path}" + (f" ({', '.join(notes)})" if notes else "")


def load_prompts(path: str | Path, *, column: str = "", max_characters: int = 4000) -> PromptSource:
    """Read a prompt file; its ending names the format.

    ========== ============================================================================
    .txt       one prompt per line
    .csv       with a header; quoted fields
    .tsv       with a header; no quoting, as PartiPrompts
    .json      a list of strings or of objects
    .jsonl     one string or object per line
    .parquet   a string column (needs the ``parquet`` extra)
    ========== ============================================================================

    Text is UTF-8, with or without a byte order mark, lines end in LF or CRLF. Empty rows (null too) are dropped and
    counted, duplicates kept and counted; `clean_prompt` says what becomes of odd characters. Everything but .json is
    streamed.

    Args:
        path: the file.
        column: column or key that holds the prompt; empty = the first of prompt, Prompt, text, caption.
        max_characters: a longer prompt is an error.

    Raises:
        UserError: missing, a folder, empty, another ending, binary, damaged, no such column, a value that is no
            string, a prompt too long or holding half a character; the message names file and line.
        MissingDependencyError: .parquet without pyarrow.
    """
    file = Path(path)
    if max_characters < 1:
        raise UserError(f"max_characters must be at least 1, got {max_characters}")
    counts = _Counts()
    try:
        _check_file(file)
        prompts = PackedStrings(_prompts(file, column, max_characters, counts))
    except OSError as error:
        raise UserError(f"prompts: cannot read {str(path)!r}: {error.strerror}") from error
    if not prompts:
        raise UserError(f"prompts: {str(path)!r} holds no prompts ({counts.empty} empty rows)")
    return PromptSource(
        prompts=prompts,
        path=str(path),
        num_empty=counts.empty,
        num_duplicates=prompts.num_duplicates(),
        num_neutralised=counts.neutralised,
    )


def _check_file(file: Path) -> None:
    if file.is_dir():
        raise UserError(f"prompts: {str(file)!r} is a folder, not a file")
    if not file.exists():
        raise UserError(f"prompts: no such file: {str(file)!r}")
    if not file.is_file():
        raise UserError(f"prompts: {str(file)!r} is not a regular file")
    if file.suffix.lower() not in READERS:
        raise UserError(f"prompts: the file must end in {', '.join(READERS)}, got {str(file)!r}")


@dataclass(slots=True)
class _Counts:
    empty: int = 0
    neutralised: int = 0


def _prompts(file: Path, column: str, max_characters: int, counts: _Counts) -> Iterator[str]:
    for row, value in READERS[file.suffix.lower()](file, column, max_characters):
        where = f"prompts: {str(file)!r} {row}"
        if value is not None and not isinstance(value, str):
            raise UserError(f"{where}: a prompt must be a string, got {value!r:.60}")
        prompt, neutralised = clean_prompt(value or "", where=where, max_characters=max_characters)
        counts.neutralised += neutralised
        if prompt:
            yield prompt
        else:
            counts.empty += 1
