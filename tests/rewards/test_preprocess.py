"""Preprocessing against PIL, against plain arithmetic and against finite differences."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastcraft.rewards.preprocess import CLIP_MEAN, CLIP_STD, resize_normalize
from fastcraft.straight_through import clamp_straight_through

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def random_picture(height, width, *, seed=0):
    """uint8 picture with flat areas and hard edges, where resampling differs most."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]


def as_tensor(picture):
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255


def by_pil(planes, size):
    """Short side to ``size`` and centre crop, of PIL images."""
    width, height = planes[0].size
    short = min(height, width)
    new = (int(size * width / short), int(size * height / short))
    left, top = round((new[0] - size) / 2), round((new[1] - size) / 2)
    box = (left, top, left + size, top + size)
    return [np.asarray(plane.resize(new, Image.Resampling.BICUBIC).crop(box)) for plane in planes]


SHAPES = [(512, 512), (96, 160), (301, 200), (40, 40)]


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_matches_pil_bicubic(height, width):
    images = as_tensor(random_picture(height, width))
    planes = by_pil([Image.fromarray(plane.numpy()) for plane in images[0]], 64)  # mode F: float32, no rounding
    got = resize_normalize(images, 64, **PLAIN)
    torch.testing.assert_close(got[0], torch.from_numpy(np.stack(planes)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_matches_pil_on_8_bit_pictures(height, width):
    picture = random_picture(height, width) // 2 + 64
    (expected,) = by_pil([Image.fromarray(picture)], 64)
    got = resize_normalize(as_tensor(picture), 64, **PLAIN)
    # PIL rounds to 8 bits after each of its two passes.
    torch.testing.assert_close(got, as_tensor(expected), rtol=0, atol=1.6 / 255)


def test_normalises_with_clip_constants_by_default():
    got = resize_normalize(torch.full((1, 3, 8, 8), 0.5), 8)
    expected = [(0.5 - mean) / std for mean, std in zip(CLIP_MEAN, CLIP_STD, strict=True)]
    torch.testing.assert_close(got[0, :, 3, 3], torch.tensor(expected))


def test_fitting_images_are_untouched_whatever_the_resize():
    images = torch.rand(2, 3, 16, 16)
    for resize in ("bicubic", "area"):
        assert torch.equal(resize_normalize(images, 16, **PLAIN, resize=resize), images)


def test_crop_is_central():
    images = torch.zeros(1, 3, 16, 20)
    images[..., 2:18] = 1.0
    assert torch.equal(resize_normalize(images, 16, **PLAIN), torch.ones(1, 3, 16, 16))


def test_area_is_the_mean_of_blocks():
    images = torch.rand(1, 3, 32, 32)
    expected = images.view(1, 3, 8, 4, 8, 4).mean(dim=(3, 5))
    torch.testing.assert_close(resize_normalize(images, 8, **PLAIN, resize="area"), expected)


@pytest.mark.parametrize("resize", ["bicubic", "area"])
@pytest.mark.parametrize("shape", [(1, 3, 7, 9), (2, 3, 4, 4)], ids=str)
def test_gradient_is_exact(resize, shape):
    torch.manual_seed(0)
    images = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: resize_normalize(x, 5, resize=resize), images)


def test_low_precision_is_raised_to_float32():
    images = torch.rand(1, 3, 24, 24).bfloat16()
    got = resize_normalize(images, 8)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, resize_normalize(images.float(), 8))


def test_clamp_passes_gradient_outside_the_range():
    images = torch.tensor([-0.5, 0.25, 1.5], requires_grad=True)
    clamped = clamp_straight_through(images)
    torch.testing.assert_close(clamped.detach(), torch.tensor([0.0, 0.25, 1.0]))
    clamped.sum().backward()
    assert torch.equal(images.grad, torch.ones(3))


def test_overshoot_is_clamped_only_on_request():
    images = as_tensor(random_picture(128, 128) // 128 * 255)
    free = resize_normalize(images, 48, **PLAIN)
    assert free.max() > 1.01
    clamped = resize_normalize(images, 48, **PLAIN, straight_through_clamp=True)
    assert clamped.max() < 1.0001
    assert clamped.min() > -0.0001


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8), (1, 3, 0, 8)], ids=str)
def test_refuses_what_is_no_batch_of_images(shape):
    with pytest.raises(ValueError, match="images must have shape"):
        resize_normalize(torch.zeros(shape), 8)


def test_refuses_an_unknown_resize():
    with pytest.raises(ValueError, match="got 'nearest'"):
        resize_normalize(torch.zeros(1, 3, 8, 8), 4, resize="nearest")
