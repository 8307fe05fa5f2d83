"""Differentiable image preprocessing, shared by the rewards.

Shape letters: B images, H and W pixels.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional

from fastcraft.straight_through import clamp_straight_through

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Resize = Literal["bicubic", "area"]
Fit = Literal["crop", "crop_floor", "pad"]
"""How a picture that is not square comes into a square; see `placement`."""


class Placement(NamedTuple):
    """Where a picture comes to lie in its square; on a square picture every `Fit` gives the same."""

    height: int
    """Of the picture after the resize, in pixels."""
    width: int
    """Likewise."""
    top: int
    """Row of the resized picture at which the square begins; negative = so many black rows above it."""
    left: int
    """Column, likewise."""


def placement(images: Tensor, size: int, fit: Fit = "crop") -> Placement:
    """How a square of ``size`` pixels is made of ``(B, 3, H, W)`` images.

    ============== ==================================================================================================
    ``crop``       The short side becomes ``size``; the centre is cut out, half a pixel rounded to the even number:
                   ``Resize`` and ``CenterCrop`` of torchvision, which OpenAI's CLIP, open_clip and ImageReward use.
    ``crop_floor`` The same with half a pixel rounded down: ``CLIPImageProcessor`` of transformers.
    ``pad``        The long side becomes ``size``; the rest is black, evenly on both sides and one pixel more below or
                   on the right: ``ResizeMaxSize`` of open_clip, which HPSv2 uses.
    ============== ==================================================================================================

    Raises:
        ValueError: a shape that is not a batch of RGB images, or an unknown ``fit``.
    """
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(f"resize_normalize: images must have shape (B, 3, H, W), got {tuple(images.shape)}")
    if fit not in get_args(Fit):
        raise ValueError(f"resize_normalize: fit must be one of {', '.join(get_args(Fit))}, got {fit!r}")
    height, width = images.shape[2:]
    if fit == "pad":
        scale = size / max(height, width)
        height, width = max(round(height * scale), 1), max(round(width * scale), 1)
        return Placement(height, width, -((size - height) // 2), -((size - width) // 2))
    short = min(height, width)
    height, width = int(size * height / short), int(size * width / short)
    if fit == "crop_floor":
        return Placement(height, width, (height - size) // 2, (width - size) // 2)
    return Placement(height, width, round((height - size) / 2), round((width - size) / 2))


def resize_normalize(
    images: Tensor,
    size: int,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    *,
    resize: Resize = "bicubic",
    fit: Fit = "crop",
    straight_through_clamp: bool = False,
) -> Tensor:
    """Resize, bring into ``size x size`` as ``fit`` says, subtract ``mean``, divide by ``std``.

    Args:
        images: ``(B, 3, H, W)`` float, sRGB in ``[0, 1]``. Arithmetic is float32, or float64 if the images are.
        size: pixels.
        mean: per channel, in ``[0, 1]``.
        std: per channel, positive.
        resize: ``"bicubic"`` is antialiased bicubic, which every official preprocessing of a CLIP-type reward uses;
            ``"area"`` is adaptive average pooling, what the released TextCraftor uses.
        fit: see `placement`.
        straight_through_clamp: clamp bicubic overshoot to ``[0, 1]`` after the resize, as 8-bit images do, with the
            gradient passing as if there were no clamp.

    Returns:
        ``(B, 3, size, size)`` float32 or float64. Images that already fit are only normalised. Where the official
        code resizes 8-bit images, it also rounds to 8 bits and clamps; where it resizes tensors, as HPSv2 does,
        neither.

    Raises:
        ValueError: a shape that is not a batch of RGB images, an unknown ``resize`` or ``fit``.
    """
    place = placement(images, size, fit)
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    if images.shape[2:] != place[:2]:
        images = _resized(images, place[:2], resize)
    if place[:2] != (size, size):  # a negative pad cuts off
        below, right = place.top + size - place.height, place.left + size - place.width
        images = functional.pad(images, (-place.left, right, -place.top, below))
    if straight_through_clamp:
        images = clamp_straight_through(images)
    # Python numbers, not tensors: a tensor made here would cost a copy to the device at every call.
    channels = [(plane - m) / s for plane, m, s in zip(images.unbind(dim=1), mean, std, strict=True)]
    return torch.stack(channels, dim=1)


def to_bytes(images: Tensor) -> Any:
    """``(B, 3, H, W)`` in ``[0, 1]`` as numpy ``(B, H, W, 3)`` uint8, what files hold and detectors read."""
    rounded = (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)
    return rounded.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _resized(images: Tensor, target: tuple[int, int], resize: Resize) -> Tensor:
    if resize == "bicubic":
        return functional.interpolate(images, size=target, mode="bicubic", antialias=True, align_corners=False)
    if resize == "area":
        return functional.adaptive_avg_pool2d(images, target)
    raise ValueError(f"resize_normalize: resize must be 'bicubic' or 'area', got {resize!r}")
