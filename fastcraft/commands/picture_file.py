"""One picture file as pixels: turned upright, without transparency, the first frame; what was done to it is said."""

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcraft.errors import UserError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

ONE_FRAME = "only the first frame is scored"
TURNED = "turned as the EXIF orientation says"
ON_WHITE = "transparency is laid on white"
_ORIENTATION = 0x0112
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")


def shown_name(file: Path) -> str:
    """The file's name as it is printed and written: bytes that are not UTF-8 and control characters are escaped."""
    name = os.fsencode(file.name).decode("utf-8", errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)


def read_picture(file: Path) -> "Tensor":
    """``(3, H, W)`` float32 in [0, 1], sRGB; see `decode`."""
    import torch

    pixels, _ = decode(file)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def decode(file: Path) -> tuple[Any, list[str]]:
    """Pixels of the first frame and what was done to get them.

    The picture is turned as its EXIF orientation says, and what is transparent shows white. Gray of 16 bits keeps its
    range. A colour profile is not applied, as no official scorer applies it.

    Returns:
        ``(H, W, 3)`` numpy float32 in [0, 1], and of `ONE_FRAME`, `TURNED`, `ON_WHITE` those that hold.

    Raises:
        UserError: no picture, damaged, cut short, too many pixels, or pixels without a known white.
    """
    from PIL import Image

    with warnings.catch_warnings():  # of bad metadata, and of large pictures that are read all the same
        warnings.simplefilter("ignore")
        try:
            with Image.open(file) as picture:
                return _decoded(picture)
        except Exception as error:  # Pillow raises a dozen types for damaged files
            raise UserError(f"--images: {shown_name(file)!r} cannot be read as a picture: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    from PIL import Image

    if isinstance(error, Image.UnidentifiedImageError):
        return "it is no picture that Pillow knows"
    text = (isinstance(error, OSError) and error.strerror) or str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def _decoded(picture: "Image.Image") -> tuple[Any, list[str]]:
    import numpy as np
    from PIL import ImageOps

    notes = [ONE_FRAME] if getattr(picture, "n_frames", 1) > 1 else []
    picture.seek(0)
    before = _orientation(picture) if picture.format == "TIFF" else 1  # Pillow turns a TIFF while it loads it
    picture.load()
    turned = max(before, _orientation(picture)) > 1
    upright = ImageOps.exif_transpose(picture) if turned else picture
    if turned:
        notes.append(TURNED)
    transparent = "transparency" in picture.info or picture.mode in _TRANSPARENT
    if picture.mode in _SIXTEEN_BITS or (picture.mode, picture.format) == ("I", "PNG"):  # older Pillows say I
        pixels, clear = _sixteen_bits(upright)
    elif picture.mode in ("I", "F"):
        raise ValueError(f"its pixels are of mode {picture.mode}, which has no known white; 8 or 16 bits are needed")
    else:
        pixels, clear = _eight_bits(upright, transparent=transparent)
    if clear:
        notes.append(ON_WHITE)
    return np.ascontiguousarray(pixels), notes


def _orientation(picture: "Image.Image") -> int:
    """From 1, upright, to 8; upright too if EXIF cannot be read, as the pixels may be good all the same."""
    try:
        value = picture.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _eight_bits(picture: "Image.Image", *, transparent: bool) -> tuple[Any, bool]:
    """Pixels, and whether any of them was transparent."""
    import numpy as np
    from PIL import Image

    clear = False
    if transparent:
        layer = picture.convert("RGBA")
        clear = bool((np.asarray(layer)[..., 3] < 255).any())
        picture = Image.new("RGBA", layer.size, "white")
        picture.alpha_composite(layer)
    return np.asarray(picture.convert("RGB"), dtype=np.float32) / 255, clear


def _sixteen_bits(picture: "Image.Image") -> tuple[Any, bool]:
    """The same of gray with values up to 65535."""
    import numpy as np

    values = np.asarray(picture).astype(np.float32)
    gray = values / 65535
    mark = picture.info.get("transparency")
    clear = values == mark if isinstance(mark, int) else np.zeros_like(values, dtype=bool)
    gray[clear] = 1.0
    return np.stack([gray] * 3, axis=2), bool(clear.any())
