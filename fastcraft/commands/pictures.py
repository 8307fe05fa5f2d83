"""Pictures on disk: in which order, which of them can be read, and which go together."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastcraft.commands.picture_file import decode
from fastcraft.errors import UserError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder:
    """What lies in a folder of pictures."""

    pictures: list[Path]
    """In the natural order of their names: 2.png before 10.png."""
    others: list[Path]
    """Files that are not read, because of their ending or a dot at the beginning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """What reading every picture once has shown; pictures go by their place in the list."""

    sizes: Mapping[int, tuple[int, int]]
    """Height and width of those that can be read."""
    notes: Mapping[int, list[str]]
    """What was done to them; see `decode`."""
    bad: dict[int, str] = field(default_factory=dict)
    """Why the others cannot; scoring adds those that went bad in the meantime."""


def list_pictures(folder: str) -> Folder:
    """Pictures directly in ``folder``.

    Raises:
        UserError: no such folder, it cannot be listed, or no picture in it.
    """
    place = Path(folder)
    if not folder or not place.is_dir():
        raise UserError(f"--images must be a folder, got {folder!r}")
    try:
        files = sorted((file for file in place.iterdir() if not file.is_dir()), key=_natural)
    except OSError as error:
        raise UserError(f"--images: folder {folder!r} cannot be listed: {error.strerror}") from error
    pictures = [file for file in files if _is_meant_as_picture(file)]
    if not pictures:
        raise UserError(f"--images: {folder!r} holds no picture ({', '.join(ENDINGS)})")
    return Folder(pictures=pictures, others=[file for file in files if file not in set(pictures)])


def _is_meant_as_picture(file: Path) -> bool:
    """By its name; a link to nowhere is a bad picture, and a pipe, which may never end, is none."""
    named_so = file.suffix.lower() in ENDINGS and not file.name.startswith(".")
    return named_so and (file.is_file() or not file.exists())


def _natural(file: Path) -> tuple[list[tuple[int, str]], str]:
    parts = re.split(r"(\d+)", file.name.casefold())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], file.name


def check_pictures(files: Sequence[Path], *, skip_bad: bool) -> Checked:
    """Read every picture once, so that a bad one is known before anything is scored.

    Raises:
        UserError: none can be read; or, without ``skip_bad``, one cannot.
    """
    from tqdm import tqdm

    sizes: dict[int, tuple[int, int]] = {}
    notes: dict[int, list[str]] = {}
    bad: dict[int, str] = {}
    for index, file in enumerate(tqdm(files, unit="picture", desc="checking", disable=None)):
        try:
            pixels, notes[index] = decode(file)
            sizes[index] = pixels.shape[:2]
        except UserError as error:
            bad[index] = str(error)
    if bad and (not sizes or not skip_bad):
        more = f" (and {len(bad) - 1} more of {len(files)})" if len(bad) > 1 else ""
        way_out = "; --skip-bad scores the others" if sizes else ""
        raise UserError(f"{next(iter(bad.values()))}{more}{way_out}")
    return Checked(sizes=sizes, notes=notes, bad=bad)


def batches(sizes: Mapping[int, tuple[int, int]], size: int) -> Iterator[list[int]]:
    """Places of pictures of one height and width, at most ``size`` at once, all of them once."""
    by_shape: dict[tuple[int, int], list[int]] = {}
    for index, shape in sizes.items():
        by_shape.setdefault(shape, []).append(index)
    for indices in by_shape.values():
        for first in range(0, len(indices), size):
            yield indices[first : first + size]


def few(names: Sequence[str], *, limit: int = 3) -> str:
    """The first few of ``names``, for a one-line message."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
