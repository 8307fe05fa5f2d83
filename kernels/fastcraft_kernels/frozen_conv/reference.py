"""The gradients of a convolution and of a linear layer in closed form, each computed only if it is wanted."""

from collections.abc import Sequence

import torch
from torch import Tensor


def conv2d_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor, *, x_shape: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients to input, weight and bias.

    Args:
        dy: ``(N, O, H', W')``.
        x: ``(N, C, H, W)``, or None where the weight's gradient is not wanted: the input's needs its shape only.
        weight: ``(O, C / groups, kH, kW)``.
        wanted: which of the three are wanted; the others are None.
    """
    if x is None:
        x = dy.new_empty(1).expand(x_shape)
    dx, dw, db = torch.ops.aten.convolution_backward(
        dy, x, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, list(wanted)
    )
    return dx if wanted[0] else None, dw if wanted[1] else None, db if wanted[2] else None


def linear_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor, *, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients to input ``(..., C)``, weight ``(O, C)`` and bias ``(O,)``; ``x`` may be None as above."""
    dx = dy @ weight if wanted[0] else None
    rows = dy.flatten(0, -2) if dy.dim() > 2 else dy.reshape(-1, dy.shape[-1])
    dw = None
    if wanted[1]:
        assert x is not None
        dw = rows.t() @ x.reshape(-1, x.shape[-1])
    return dx, dw, rows.sum(0) if wanted[2] else None
