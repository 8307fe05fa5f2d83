"""Pictures on disk hold the pictures that were given."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastcraft.evaluation.images import (
    CELL,
    GAP,
    MAX_CAPTION_LINES,
    caption_font,
    sample_files,
    sample_steps,
    save_grid,
    save_samples,
    to_uint8,
    wrap,
)

AWKWARD = "<b>é</b> 日本語 مرحبا 🙂 \ud800 \x00\n" + "word " * 60


def pixels_of(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def test_bytes_round_clamp_and_show_nan():
    images = torch.tensor([0.0, 0.5, 1.0, 2.0, -1.0, float("nan")]).expand(1, 3, 1, 6).clone()
    images[0, 1:, 0, 5] = 0.5  # one broken channel is enough
    rows = to_uint8(images)
    assert rows.dtype == np.uint8
    assert rows[0, 0, :5, 0].tolist() == [0, 128, 255, 255, 0]
    assert rows[0, 0, 5].tolist() == [255, 0, 255]
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        to_uint8(torch.zeros(1, 1, 4, 4))


@pytest.mark.parametrize(("size", "factor"), [(64, 3), (100, 2), (192, 1), (512, 1)])
def test_a_grid_holds_every_picture(tmp_path, size, factor):
    images = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    path = save_grid(images, tmp_path / "new" / "grid.png", captions=["a", "b", AWKWARD], columns=2)
    grid = pixels_of(path)
    cell = size * factor
    assert cell == size or abs(cell - CELL) <= size / 2
    assert grid.shape[1] == GAP + 2 * (cell + GAP)
    row_height = (grid.shape[0] - GAP) // 2
    for index, picture in enumerate(to_uint8(images)):
        row, column = divmod(index, 2)
        top, left = GAP + row * row_height, GAP + column * (cell + GAP)
        shown = grid[top : top + cell, left : left + cell]
        assert np.array_equal(shown, picture.repeat(factor, 0).repeat(factor, 1)), f"picture {index} is not in the grid"
        below = grid[top + cell : top + row_height, left : left + cell]
        assert (below < 128).any(), f"caption {index} is not in the grid"


def test_a_grid_without_captions_is_white_between(tmp_path):
    grid = pixels_of(save_grid(torch.zeros(5, 3, 96, 96), tmp_path / "grid.png"))
    assert grid.shape == (2 * (192 + GAP) + GAP, 4 * (192 + GAP) + GAP, 3)
    assert (grid == 0).all(axis=2).sum() == 5 * 192 * 192
    assert ((grid == 0) | (grid == 255)).all()


def test_what_does_not_fit_together_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one for each of the 2 images, got 1"):
        save_grid(torch.zeros(2, 3, 8, 8), tmp_path / "grid.png", captions=["a"])
    with pytest.raises(ValueError, match="at least one picture"):
        save_grid(torch.zeros(0, 3, 8, 8), tmp_path / "grid.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "one", AWKWARD, "x" * 5000, "日本語" * 500, "short " + "y" * 300 + " end"])
@pytest.mark.parametrize("width", [30, 192])
def test_captions_stay_inside_their_cell(text, width):
    font = caption_font(13)
    lines = wrap(text, font, width)
    assert len(lines) <= MAX_CAPTION_LINES
    assert all(font.getlength(line) <= width for line in lines)
    if len(text) > 1000:
        assert lines[-1].endswith("…")
    if text in ("", "one"):
        assert lines == [text][: len(text)]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = save_grid(torch.zeros(1, 3, 8, 8), tmp_path / "grid.png")
    old = path.read_bytes()

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"fastcraft.durable.os.{call}", broken)
    with pytest.raises(OSError, match="No space left"):
        save_grid(torch.ones(1, 3, 8, 8), path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_samples_come_back_in_order(tmp_path):
    images = torch.linspace(0, 1, 12)[:, None, None, None].expand(12, 3, 8, 8)
    grid = save_samples(images, tmp_path, step=50, prompts=[str(i) for i in range(12)])
    save_samples(images[:2], tmp_path, step=0, prompts=["a", "b"])
    assert grid == tmp_path / "samples" / "step-000050.png"
    assert sample_steps(tmp_path) == [0, 50]
    files = sample_files(tmp_path, 50)
    assert [pixels_of(file)[0, 0, 0] for file in files] == to_uint8(images)[:, 0, 0, 0].tolist()
    assert sample_files(tmp_path, 7) == []


def test_fewer_samples_leave_no_old_ones(tmp_path):
    save_samples(torch.zeros(4, 3, 8, 8), tmp_path, step=1, prompts=list("abcd"))
    save_samples(torch.ones(2, 3, 8, 8), tmp_path, step=1, prompts=list("ab"))
    assert len(sample_files(tmp_path, 1)) == 2
