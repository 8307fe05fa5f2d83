"""Pictures on disk: in which order, which go together, and as what they are read."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastcraft.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def list_pictures(folder: str) -> list[Path]:
    """Pictures directly in ``folder``, in the natural order of their names: 2.png before 10.png.

    Raises:
        UserError: no such folder, or no picture in it.
    """
    place = Path(folder)
    if not place.is_dir():
        raise UserError(f"--images must be a folder, got {folder!r}")
    files = [file for file in place.iterdir() if file.suffix.lower() in ENDINGS]
    if not files:
        raise UserError(f"--images: {folder!r} holds no picture ({', '.join(ENDINGS)})")
    return sorted(files, key=_natural)


def _natural(file: Path) -> tuple[list[tuple[int, str]], str]:
    parts = re.split(r"(\d+)", file.name.casefold())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], file.name


def batches(files: Sequence[Path], size: int) -> Iterator[list[int]]:
    """Indices of pictures of one width and height, at most ``size`` at once, all of them once.

    Raises:
        UserError: a file that is no picture.
    """
    by_shape: dict[tuple[int, int], list[int]] = {}
    for index, file in enumerate(files):
        by_shape.setdefault(_shape(file), []).append(index)
    for indices in by_shape.values():
        for first in range(0, len(indices), size):
            yield indices[first : first + size]


def _shape(file: Path) -> tuple[int, int]:
    from PIL import Image

    try:
        with Image.open(file) as picture:
            return picture.size
    except OSError as error:
        raise UserError(f"--images: {str(file)!r} cannot be read as a picture: {error}") from error


def read_picture(file: Path) -> "Tensor":
    """``(3, H, W)`` float32 in [0, 1], sRGB; transparency is dropped.

    Raises:
        UserError: a file that is no picture, or is cut short.
    """
    import numpy as np
    import torch
    from PIL import Image

    try:
        with Image.open(file) as picture:
            pixels = np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise UserError(f"--images: {str(file)!r} cannot be read as a picture: {error}") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
