"""Differentiable image preprocessing, shared by the rewards.

Shape letters: B images, H and W pixels.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from fastcraft.straight_through import clamp_straight_through

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Resize = Literal["bicubic", "area"]


def resize_normalize(
    images: Tensor,
    size: int,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    *,
    resize: Resize = "bicubic",
    straight_through_clamp: bool = False,
) -> Tensor:
    """Short side to ``size``, centre crop to ``size x size``, subtract ``mean``, divide by ``std``.

    Args:
        images: ``(B, 3, H, W)`` float, sRGB in ``[0, 1]``. Arithmetic is float32, or float64 if the images are.
        size: pixels.
        mean: per channel, in ``[0, 1]``.
        std: per channel, positive.
        resize: ``"bicubic"`` is antialiased bicubic, the official preprocessing of every CLIP-type reward (PIL's, up
            to rounding); ``"area"`` is adaptive average pooling, what the released TextCraftor uses.
        straight_through_clamp: clamp bicubic overshoot to ``[0, 1]`` after the resize, as 8-bit images do, with the
            gradient passing as if there were no clamp.

    Returns:
        ``(B, 3, size, size)`` float32 or float64. Images that already fit are only normalised.

    Raises:
        ValueError: a shape that is not a batch of RGB images, or an unknown ``resize``.
    """
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(f"resize_normalize: images must have shape (B, 3, H, W), got {tuple(images.shape)}")
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    height, width = images.shape[2:]
    short = min(height, width)
    if short != size:
        target = (int(size * height / short), int(size * width / short))
        images = _resized(images, target, resize)
    images = _centre_crop(images, size)
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


def _centre_crop(images: Tensor, size: int) -> Tensor:
    height, width = images.shape[2:]
    top, left = round((height - size) / 2), round((width - size) / 2)
    return images[:, :, top : top + size, left : left + size]
