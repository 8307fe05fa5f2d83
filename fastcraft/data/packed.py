"""A list of strings in two flat arrays: ten million prompts take little more than their bytes."""

from array import array
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np


class PackedStrings(Sequence[str]):
    """An immutable sequence of strings, kept as UTF-8 in one buffer and decoded when asked for.

    Memory is the text plus 8 bytes per string (a Python list of strings: 57 bytes more each, and up to 4 bytes per
    character).
    """

    def __init__(self, strings: Iterable[str]) -> None:
        buffer = bytearray()
        ends = array("Q", [0])
        for string in strings:
            buffer += string.encode("utf-8")
            ends.append(len(buffer))
        self._buffer = bytes(buffer)
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} strings")
        index %= len(self)
        return self._buffer[self._ends[index] : self._ends[index + 1]].decode("utf-8")

    def __repr__(self) -> str:
        return f"PackedStrings({len(self)} strings, {len(self._buffer)} bytes)"

    def num_duplicates(self) -> int:
        """How many strings equal an earlier one (by 64-bit hash: a false match among ten million is 1 in 400 000)."""
        hashes = np.fromiter((hash(string) for string in self), dtype=np.int64, count=len(self))
        return len(self) - len(np.unique(hashes))
