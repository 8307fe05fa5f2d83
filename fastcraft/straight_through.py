"""A clamp to [0, 1] that lets the gradient pass: for decoded pictures, and for what a reward's resize overshoots."""

from typing import Any

import torch
from torch import Tensor


def clamp_straight_through(images: Tensor) -> Tensor:
    """``images``, any shape and float dtype, clamped to [0, 1] to the last bit; backward is the identity.

    Values outside still learn, which changes the gradient. Nothing is kept for backward.
    Source: straight-through estimator, Bengio et al. 2013, arXiv:1308.3432.
    """
    clamped: Tensor = _StraightThroughClamp.apply(images)
    return clamped


class _StraightThroughClamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        return images.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]
