"""Each reward prepares pictures as its official code does: against copies of that code made of PIL alone.

The copies work on float planes, as PIL's mode F does, so nothing is rounded; that they are right on 8-bit pictures is
shown by transformers' own processor and by PIL on the picture as it is.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fastcraft.rewards import REWARDS
from fastcraft.rewards.clip_tower import Towers
from fastcraft.rewards.preprocess import resize_normalize

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
SIZE = 32
"""Of the stand-ins' square."""
FITS = ("crop", "crop_floor", "pad")
OFFICIAL = {
    "aesthetic": "crop", "clip": "crop", "imagereward": "crop",
    "pickscore": "crop_floor", "denscore": "crop_floor",
    "hpsv2": "pad", "hpsv2.1": "pad",
}  # fmt: skip
WHOLE = {"brightness", "callable", "face", "hand", "jpeg_size"}
"""Rewards that look at every pixel."""
SHAPES = [(96, 64), (64, 96), (24, 17), (17, 24), (31, 101), (101, 31), (40, 33), (32, 70), (20, 32), (150, 110)]
"""Portrait and landscape, larger and smaller than the square, odd, and with one side that fits already."""


def picture(height, width, *, seed=0):
    """uint8, with flat areas and hard edges, where resampling and cutting show most."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (height // 5 + 1, width // 5 + 1, 3), dtype=np.uint8)
    return coarse.repeat(5, axis=0).repeat(5, axis=1)[:height, :width]


def as_tensor(pixels):
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float() / 255


def by_pil(plane, width, height):
    return plane.resize((width, height), Image.Resampling.BICUBIC)


def resize_max_size(plane, size):
    """HPSv2's transform: the long side to ``size``, black around."""
    width, height = plane.size
    scale = size / float(max(height, width))
    new_height, new_width = (round(side * scale) for side in (height, width))
    pad_height, pad_width = size - new_height, size - new_width
    square = np.zeros((size, size), dtype=np.float32)
    top, left = pad_height // 2, pad_width // 2
    square[top : top + new_height, left : left + new_width] = np.asarray(by_pil(plane, new_width, new_height))
    return square


def short_side_and_crop(plane, size, cut):
    """torchvision's and transformers' transforms: the short side to ``size``; ``cut`` says where the centre begins."""
    width, height = plane.size
    short = min(height, width)
    new_height, new_width = (size if side == short else int(size * side / short) for side in (height, width))
    top, left = cut(new_height - size), cut(new_width - size)
    return np.asarray(by_pil(plane, new_width, new_height))[top : top + size, left : left + size]


COPIES = {
    "crop": lambda plane, size: short_side_and_crop(plane, size, lambda rest: round(rest / 2.0)),
    "crop_floor": lambda plane, size: short_side_and_crop(plane, size, lambda rest: rest // 2),
    "pad": resize_max_size,
}


def official(images, fit, size=SIZE):
    """``(B, 3, size, size)``, by the copy."""
    squares = [[COPIES[fit](Image.fromarray(plane.numpy()), size) for plane in image] for image in images]
    return torch.from_numpy(np.array(squares))


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", [(768, 512), (512, 768), (100, 150), (61, 45), (301, 200), (200, 303), (224, 100)])
def test_pixels_are_those_of_the_copy_at_full_size(shape, fit):
    images = as_tensor(picture(*shape))
    got = resize_normalize(images, 224, **PLAIN, fit=fit)
    torch.testing.assert_close(got, official(images, fit, 224), rtol=0, atol=5e-5)


@pytest.mark.parametrize("shape", [*SHAPES, (50, 50)])
def test_the_floored_crop_is_transformers_own(shape):
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, do_normalize=False
    )
    pixels = picture(*shape) // 2 + 64  # nothing overshoots, so nothing is clamped between PIL's two passes
    (theirs,) = processor(images=Image.fromarray(pixels), return_tensors="np")["pixel_values"]
    got = resize_normalize(as_tensor(pixels), SIZE, **PLAIN, fit="crop_floor")
    torch.testing.assert_close(got[0], torch.from_numpy(theirs), rtol=0, atol=1.6 / 255)


def test_the_two_crops_are_not_the_same():
    images = as_tensor(picture(35, 32))
    crop, floor = (resize_normalize(images, SIZE, **PLAIN, fit=fit) for fit in ("crop", "crop_floor"))
    assert torch.equal(crop, images[:, :, 2:34])
    assert torch.equal(floor, images[:, :, 1:33])


@pytest.fixture(scope="module")
def build(bundled, standins):
    """A reward by name; the shared models are loaded once."""
    towers = Towers(device="cpu", dtype=torch.float32, bundled=bundled)

    def make(name):
        path, options = standins[name]
        return REWARDS.get(name).build(path, towers=towers, **options)

    return make


def test_every_reward_is_looked_at_and_says_its_own():
    assert set(OFFICIAL) | WHOLE == set(REWARDS.names())
    for name in REWARDS.names():
        assert "Official preprocessing" in vars(REWARDS.get(name))["__doc__"], name


@torch.no_grad()
@pytest.mark.parametrize("name", OFFICIAL)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_score_is_that_of_the_officially_prepared_picture(name, shape, build):
    images = torch.cat([as_tensor(picture(*shape, seed=seed)) for seed in range(2)])
    reward, prompts = build(name), ["a cat", "two dogs"]
    scores = {fit: reward(official(images, fit), prompts) for fit in FITS}
    expected = scores.pop(OFFICIAL[name])
    torch.testing.assert_close(reward(images, prompts), expected, rtol=1e-4, atol=1e-4)
    assert (scores["crop" if OFFICIAL[name] == "pad" else "pad"] - expected).abs().max() > 5e-3, "the test can tell"


@pytest.mark.parametrize("name", ["hpsv2", "hpsv2.1"])
@pytest.mark.parametrize("shape", [(96, 64), (48, 96)], ids=str)
def test_the_gradient_of_hps_is_the_official_one(name, shape, build):
    """Cosine 1 with the transform written with torch, whose gradient autograd knows."""
    images = as_tensor(picture(*shape)).requires_grad_()
    new = [round(side * SIZE / max(shape)) for side in shape]
    rest = [SIZE - side for side in new]
    square = functional.interpolate(images, new, mode="bicubic", antialias=True)
    square = functional.pad(square, (rest[1] // 2, rest[1] - rest[1] // 2, rest[0] // 2, rest[0] - rest[0] // 2))
    (expected,) = torch.autograd.grad(build(name)(square, ["a cat"]).sum(), images)
    (got,) = torch.autograd.grad(build(name)(images, ["a cat"]).sum(), images)
    assert functional.cosine_similarity(got.flatten(), expected.flatten(), dim=0) > 0.9999
    assert got[..., 0, 0].abs().sum() > 0, "the corner is seen"


@torch.no_grad()
@pytest.mark.parametrize("name", OFFICIAL)
@pytest.mark.parametrize("side", [17, 32, 64, 101])
def test_square_pictures_are_resized_and_nothing_else(name, side, build):
    """Scores of square pictures are what they always were, to the last bit."""
    images = as_tensor(picture(side, side))
    resized = functional.interpolate(images, (SIZE, SIZE), mode="bicubic", antialias=True) if side != SIZE else images
    assert torch.equal(build(name)(images, ["a cat"]), build(name)(resized, ["a cat"]))


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(WHOLE))
def test_the_other_rewards_see_the_whole_picture(name, build, mediapipe):
    images = torch.full((1, 3, 8, 40), 0.5)
    brighter = images.clone()
    brighter[..., :4] = torch.rand(1, 3, 8, 4).round()
    assert not torch.equal(build(name)(images, ["a"]), build(name)(brighter, ["a"])), "the far left is cut off"


def test_square_pictures_are_prepared_once_for_all_ways_to_fit(build):
    tower = build("pickscore").tower
    square, wide = torch.rand(1, 3, 40, 40), torch.rand(1, 3, 40, 55)
    with tower.shared_images():
        pixels = [tower.preprocessed(square, SIZE, resize="bicubic", clamp=False, fit=fit) for fit in FITS]
        assert pixels[0] is pixels[1] is pixels[2]
        pixels = [tower.preprocessed(wide, SIZE, resize="bicubic", clamp=False, fit=fit) for fit in FITS]
        assert not torch.equal(pixels[0], pixels[2])


def test_refuses_an_unknown_fit():
    with pytest.raises(ValueError, match="fit must be one of crop, crop_floor, pad, got 'squash'"):
        resize_normalize(torch.zeros(1, 3, 8, 8), 4, fit="squash")
