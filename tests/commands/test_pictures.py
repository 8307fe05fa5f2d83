"""Picture files as pixels: what Pillow would do silently is done right, and said."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fastcraft.commands.picture_file import ON_WHITE, ONE_FRAME, TURNED, decode, read_picture, shown_name
from fastcraft.commands.pictures import ENDINGS, batches, check_pictures, few, list_pictures
from fastcraft.errors import UserError

RED, GREEN, BLUE, WHITE = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 1.0)


def pixels_of(image, path, **options):
    image.save(path, **options)
    return decode(path)


@pytest.fixture
def corners():
    """3 x 5 pixels, of which each corner has a colour of its own."""
    picture = np.zeros((3, 5, 3), dtype=np.uint8)
    picture[0, 0], picture[0, -1], picture[-1, 0], picture[-1, -1] = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255,) * 3
    return picture


@pytest.mark.parametrize("ending", ["png", "tiff", "tif", "bmp", "webp", "gif"])
def test_plain_pictures_are_read_as_they_are(ending, corners, tmp_path):
    options = {"lossless": True} if ending == "webp" else {}
    got, notes = pixels_of(Image.fromarray(corners), tmp_path / f"a.{ending}", **options)
    assert got.dtype == np.float32
    assert np.array_equal(got, corners.astype(np.float32) / 255)
    assert notes == []
    assert f".{ending}" in ENDINGS
    assert torch.equal(read_picture(tmp_path / f"a.{ending}"), torch.from_numpy(got).permute(2, 0, 1))


def test_gray_of_sixteen_bits_keeps_its_range(tmp_path):
    values = np.array([[0, 1000, 30000, 65535]], dtype=np.uint16)
    for ending in ("png", "tiff"):
        got, notes = pixels_of(Image.fromarray(values), tmp_path / f"a.{ending}")
        np.testing.assert_allclose(got, np.stack([values / 65535] * 3, axis=2), atol=1e-6)
        assert notes == []


def test_sixteen_bits_with_a_transparent_level(tmp_path):
    got, notes = pixels_of(Image.fromarray(np.array([[0, 4369]], dtype=np.uint16)), tmp_path / "a.png", transparency=0)
    np.testing.assert_allclose(got[0], [WHITE, [4369 / 65535] * 3], atol=1e-6)
    assert notes == [ON_WHITE]


@pytest.mark.parametrize("values", [np.float32([[0.5]]), np.int32([[70000]])], ids=["float", "int"])
def test_pixels_without_a_known_white_are_refused(values, tmp_path):
    with pytest.raises(UserError, match=r"its pixels are of mode [FI], which has no known white; 8 or 16 bits are"):
        pixels_of(Image.fromarray(values), tmp_path / "a.tiff")


TURNS = {
    2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: np.rot90,
}  # fmt: skip
"""What each EXIF orientation asks for."""


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tiff", "webp"])
def test_the_exif_orientation_is_followed(orientation, ending, corners, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if ending == "webp" else {}
    got, notes = pixels_of(Image.fromarray(corners), tmp_path / f"a.{ending}", exif=exif, **options)
    expected = TURNS.get(orientation, np.asarray)(corners)
    assert np.array_equal(got, expected.astype(np.float32) / 255)
    assert notes == ([TURNED] if orientation > 1 else [])


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"\0" * 40], ids=["1", "2", "3"]
)
def test_exif_that_cannot_be_read_costs_nothing(exif, corners, tmp_path):
    got, notes = pixels_of(Image.fromarray(corners), tmp_path / "a.png", exif=exif)
    assert np.array_equal(got, corners.astype(np.float32) / 255)
    assert notes == []


def test_a_jpeg_is_turned_and_batched_by_its_size_then(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 6)).save(tmp_path / "1.jpg", exif=exif)
    Image.new("RGB", (6, 8)).save(tmp_path / "2.png")
    checked = check_pictures(list_pictures(str(tmp_path)).pictures, skip_bad=False)
    assert list(batches(checked.sizes, 8)) == [[0, 1]]
    assert checked.notes == {0: [TURNED], 1: []}


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), WHITE),
        ("RGBA", (255, 0, 0, 51), (1.0, 0.8, 0.8)),
        ("LA", (0, 51), (0.8, 0.8, 0.8)),
    ],
)
def test_transparency_is_laid_on_white(mode, color, expected, tmp_path):
    got, notes = pixels_of(Image.new(mode, (2, 2), color), tmp_path / "a.png")
    np.testing.assert_allclose(got[0, 0], expected, atol=1e-6)
    assert notes == [ON_WHITE]


def test_a_transparent_colour_is_laid_on_white(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    for ending in ("png", "gif"):
        got, notes = pixels_of(palette, tmp_path / f"a.{ending}", transparency=0)
        assert np.array_equal(got[0], [WHITE, GREEN])
        assert notes == [ON_WHITE]
    got, notes = pixels_of(Image.new("RGB", (1, 1), (255, 0, 0)), tmp_path / "rgb.png", transparency=(255, 0, 0))
    assert np.array_equal(got[0], [WHITE])
    assert notes == [ON_WHITE]


def test_an_opaque_picture_with_an_alpha_channel_says_nothing(tmp_path):
    got, notes = pixels_of(Image.new("RGBA", (1, 1), (255, 0, 0, 255)), tmp_path / "a.png")
    assert np.array_equal(got[0], [RED])
    assert notes == []


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tiff"])
def test_of_several_frames_the_first_is_read(ending, tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("blue", "red", "green")]
    options = {"lossless": True} if ending == "webp" else {}
    got, notes = pixels_of(frames[0], tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:], **options)
    np.testing.assert_allclose(got[0, 0], BLUE, atol=1e-6)
    assert notes == [ONE_FRAME]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(mode, tmp_path):
    source = Image.new("RGB", (8, 8), "white").convert(mode)
    got, notes = pixels_of(source, tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png"))
    np.testing.assert_allclose(got, 1.0, atol=0.02)
    assert notes == []


def saved(image, **options):
    stream = io.BytesIO()
    image.save(stream, **options)
    return stream.getvalue()


def bad_files():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    png, jpeg, gif = saved(noise, format="PNG"), saved(noise, format="JPEG"), saved(noise, format="GIF")
    return {
        "empty.png": b"", "text.png": b"no picture", "cut.png": png[: len(png) // 2], "cut.jpg": jpeg[: len(jpeg) // 2],
        "cut.gif": gif[:100], "spoiled.png": png[:60] + b"\0" * 40 + png[100:], "page.webp": b"<!DOCTYPE html>",
        "header.tiff": b"II*\0\x08\0\0\0", "header.bmp": b"BM" + b"\0" * 20,
    }  # fmt: skip


@pytest.mark.parametrize("name", bad_files())
def test_a_bad_file_is_one_line(name, tmp_path):
    (tmp_path / name).write_bytes(bad_files()[name])
    with pytest.raises(UserError, match=f"^--images: '{name}' cannot be read as a picture: .") as error:
        decode(tmp_path / name)
    assert "\n" not in str(error.value)
    assert str(tmp_path) not in str(error.value)


def test_too_many_pixels_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
    header = b"IHDR" + struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, b"IDAT")]
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    with pytest.raises(UserError, match=r"'bomb.png' cannot be read as a picture: Image size \(400000000 pixels\) exc"):
        decode(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # beyond it Pillow warns, and beyond its double it refuses
    Image.new("RGB", (5, 6)).save(tmp_path / "large.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(tmp_path / "large.png")[0].shape == (6, 5, 3)


def test_names_that_are_not_utf8_are_escaped(tmp_path):
    file = tmp_path / b"caf\xe9\n.png".decode("utf-8", "surrogateescape")
    Image.new("RGB", (1, 1)).save(file)
    assert shown_name(file) == "caf\\xe9\\n.png"
    assert shown_name(tmp_path / "\u732b 1.png") == "\u732b 1.png"
    assert decode(file)[0].shape == (1, 1, 3)


def test_what_lies_in_the_folder_is_told_apart(tmp_path):
    for name in ("10.png", "2.JPEG", "1.gif", "3.tif", ".hidden.png", "notes.txt", "4.heic"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "5.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    folder = list_pictures(str(tmp_path))
    assert [file.name for file in folder.pictures] == ["1.gif", "2.JPEG", "3.tif", "5.png", "10.png"]
    assert {file.name for file in folder.others} == {".hidden.png", "notes.txt", "4.heic", "pipe.png"}
    with pytest.raises(UserError, match=r"'5.png' cannot be read as a picture: No such file or directory$"):
        decode(tmp_path / "5.png")


def test_every_bad_picture_is_counted_before_anything_is_scored(tmp_path):
    for name in ("1.png", "2.png", "3.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "2.png").write_bytes(b"")
    (tmp_path / "3.png").write_bytes(b"")
    files = list_pictures(str(tmp_path)).pictures
    with pytest.raises(UserError, match=r"'2.png' cannot .* \(and 1 more of 3\); --skip-bad scores the others"):
        check_pictures(files, skip_bad=False)
    checked = check_pictures(files, skip_bad=True)
    assert checked.sizes == {0: (4, 4)}
    assert set(checked.bad) == {1, 2}
    (tmp_path / "1.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"'1.png' cannot be read .* \(and 2 more of 3\)$"):
        check_pictures(files, skip_bad=True)


def test_batches_hold_one_size_each_and_everything_once():
    sizes = {0: (4, 4), 2: (4, 4), 3: (4, 8), 5: (4, 4), 6: (8, 4)}
    assert list(batches(sizes, 2)) == [[0, 2], [5], [3], [6]]


def test_few_names_are_listed():
    assert few(["a", "b"]) == "a, b"
    assert few(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
