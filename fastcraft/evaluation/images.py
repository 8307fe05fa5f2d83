"""Pictures on disk: grids that a person looks at and single files that the report reads back."""

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastcraft.durable import write_bytes, write_json

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

CELL = 192
"""Pictures narrower than this are enlarged in a grid by the whole factor that comes nearest to it, pixels."""
GAP = 10
MAX_CAPTION_LINES = 4
NOT_A_NUMBER = (255, 0, 255)
"""Magenta: a pixel with NaN or Inf is shown, not hidden."""


def to_uint8(images: Tensor) -> Any:
    """Pictures as bytes.

    Args:
        images: (B, 3, H, W) floating point in [0, 1]; values outside are clamped, NaN and Inf become magenta.

    Returns:
        (B, H, W, 3) numpy uint8 on the CPU, rounded to nearest.

    Raises:
        ValueError: another shape.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (B, 3, H, W), got shape {tuple(images.shape)}")
    pixels = images.detach().float().cpu().permute(0, 2, 3, 1)  # (B, H, W, 3)
    broken = ~pixels.isfinite().all(dim=-1)
    pixels = pixels.nan_to_num(0.0).clamp(0, 1).mul(255).round().to(torch.uint8).contiguous()
    pixels[broken] = torch.tensor(NOT_A_NUMBER, dtype=torch.uint8)
    return pixels.numpy()


def save_grid(images: Tensor, path: Path, *, captions: Sequence[str] | None = None, columns: int | None = None) -> Path:
    """One PNG with every picture, row by row, each above its caption.

    Args:
        images: (B, 3, H, W) floating point in [0, 1], B at least 1.
        path: written whole or not at all.
        captions: B texts in any script; wrapped under the picture, four lines at most.
        columns: pictures per row; None = up to 4, or about a square from 17 pictures on.

    Raises:
        ValueError: no pictures, or not as many captions as pictures.
    """
    from PIL import Image, ImageDraw

    pixels = to_uint8(images)
    count, height, width = pixels.shape[:3]
    if not count:
        raise ValueError("images must hold at least one picture, got 0")
    if captions is not None and len(captions) != count:
        raise ValueError(f"captions must be one for each of the {count} images, got {len(captions)}")
    columns = min(columns or (4 if count <= 16 else math.ceil(math.sqrt(count))), count)
    factor = max(1, round(CELL / width))
    cell_width, cell_height = width * factor, height * factor
    font = caption_font(max(13, cell_width // 32))
    line_height = math.ceil(font.size * 1.35)
    texts = [wrap(caption, font, cell_width) for caption in captions or [""] * count]
    row_height = cell_height + line_height * max(map(len, texts)) + GAP
    size = (GAP + columns * (cell_width + GAP), GAP + math.ceil(count / columns) * row_height)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for index in range(count):
        row, column = divmod(index, columns)
        left, top = GAP + column * (cell_width + GAP), GAP + row * row_height
        picture = Image.fromarray(pixels[index]).resize((cell_width, cell_height), Image.Resampling.NEAREST)
        canvas.paste(picture, (left, top))
        for number, line in enumerate(texts[index]):
            draw.text((left, top + cell_height + 3 + number * line_height), line, fill="#333333", font=font)
    return _save_png(canvas, path)


def _save_png(picture: "Image", path: Path) -> Path:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return write_bytes(path, buffer.getvalue())


def caption_font(size: int) -> "FreeTypeFont":
    """DejaVu Sans, which matplotlib carries: Latin, Greek, Cyrillic, Arabic; a glyph it lacks is drawn as a box."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def wrap(text: str, font: "FreeTypeFont", width: int) -> list[str]:
    """Lines of at most ``width`` pixels, at most `MAX_CAPTION_LINES`; the last ends in an ellipsis if text is left."""
    lines: list[str] = []
    line = ""
    for word in plain(text).split():
        candidate = f"{line} {word}" if line else word
        if font.getlength(candidate) <= width:
            line = candidate
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width and len(lines) <= MAX_CAPTION_LINES:
            cut = max(1, sum(font.getlength(word[: end + 1]) <= width for end in range(min(len(word), width))))
            lines.append(word[:cut])
            word = word[cut:]
        line = word
        if len(lines) > MAX_CAPTION_LINES:
            break
    lines += [line] if line else []
    if len(lines) > MAX_CAPTION_LINES:
        last = lines[MAX_CAPTION_LINES - 1]
        while last and font.getlength(f"{last}…") > width:
            last = last[:-1]
        lines = [*lines[: MAX_CAPTION_LINES - 1], f"{last.rstrip()}…"]
    return lines


def plain(text: str) -> str:
    """``text`` that any font or file takes: control characters become blanks, lone surrogates become U+FFFD."""
    return "".join(
        "\ufffd" if "\ud800" <= char <= "\udfff" else " " if ord(char) < 32 or 127 <= ord(char) < 160 else char
        for char in text
    )


def save_samples(images: Tensor, run_dir: Path, *, step: int, prompts: Sequence[str]) -> Path:
    """The pictures of one evaluation: ``samples/step-NNNNNN.png`` (grid), ``samples/step-NNNNNN/NNN.png``, prompts.

    Args:
        images: (B, 3, H, W) floating point in [0, 1], the same prompts and seeds every time.
        prompts: B texts; kept in ``samples/prompts.json``.

    Returns:
        The grid's path.
    """
    from PIL import Image

    folder = run_dir / "samples"
    grid = save_grid(images, folder / f"step-{step:06d}.png", captions=prompts)
    for index, pixels in enumerate(to_uint8(images)):
        _save_png(Image.fromarray(pixels), folder / f"step-{step:06d}" / f"{index:03d}.png")
    for surplus in sample_files(run_dir, step)[len(images) :]:
        surplus.unlink()  # of a longer list of prompts, before this step was done again
    write_json(folder / "prompts.json", list(prompts))
    return grid


def sample_files(run_dir: Path, step: int) -> list[Path]:
    """Single pictures of one step, in the order of the prompts; empty if none were saved."""
    return sorted((run_dir / "samples" / f"step-{step:06d}").glob("[0-9]*.png"), key=lambda path: int(path.stem))


def sample_steps(run_dir: Path) -> list[int]:
    """Steps that have single pictures, ascending."""
    names = [path.name for path in (run_dir / "samples").glob("step-*") if path.is_dir()]
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step-\d{6,}", name))
