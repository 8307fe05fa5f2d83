"""Registration of `frozen_conv2d` and `frozen_linear`.

There is no Triton kernel here: cuDNN and cuBLAS compute both. What is ours is what autograd keeps. PyTorch's
convolution keeps its input even where only the input's gradient is wanted, which needs nothing but the weight
(https://github.com/pytorch/pytorch/issues/133566).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcraft_kernels.frozen_conv.reference import conv2d_backward, linear_backward


def frozen_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0, dilation: int | Sequence[int] = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    """2-D convolution for a weight that is not trained.

    Args:
        x: ``(N, C, H, W)``, contiguous or channels-last; the output follows it.
        weight: ``(O, C / groups, kH, kW)``, same dtype and device.
        bias: ``(O,)`` or None.
        stride, padding, dilation: one number or two.

    Returns:
        ``(N, O, H', W')``, dtype of ``x``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.

    Saves for backward: the weight, which exists anyway; ``x`` only where the weight requires gradient.
    """
    if x.dim() != 4 or weight.dim() != 4:
        raise ValueError(
            f"frozen_conv2d: x and weight must have 4 dimensions, got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if x.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"frozen_conv2d: x must have {weight.shape[1] * groups} channels for weight {tuple(weight.shape)} and "
            f"groups {groups}, got {x.shape[1]}"
        )
    _check("frozen_conv2d", x, weight, bias)
    sizes = [_pair(name, value) for name, value in (("stride", stride), ("padding", padding), ("dilation", dilation))]
    return _frozen_conv2d(x, weight, bias, *sizes, groups)


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias`` for a weight that is not trained.

    Args:
        x: ``(..., C)``.
        weight: ``(O, C)``, same dtype and device.
        bias: ``(O,)`` or None.

    Returns:
        ``(..., O)``, dtype of ``x``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.

    Saves for backward: the weight, which exists anyway; ``x`` only where the weight requires gradient. PyTorch's own
    linear layer does the same; this one serves 1x1 convolutions, which do not.
    """
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"frozen_linear: the last dimension of x must be that of weight (O, C), got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    _check("frozen_linear", x, weight, bias)
    return _frozen_linear(x, weight, bias)


def _check(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"{op}: {name} must have the dtype and device of x ({x.dtype}, {x.device}), got {tensor.dtype}, "
                f"{tensor.device}"
            )
    if not x.is_floating_point():
        raise ValueError(f"{op}: x must be a floating-point tensor, got {x.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def _pair(name: str, value: int | Sequence[int]) -> list[int]:
    pair = [value, value] if isinstance(value, int) else list(value)
    if len(pair) != 2 or not all(isinstance(number, int) for number in pair):
        raise ValueError(f"frozen_conv2d: {name} must be one or two whole numbers, got {value!r}")
    return pair


@torch.library.custom_op("fastcraft::frozen_conv2d", mutates_args=())
def _frozen_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


@_frozen_conv2d.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *sizes: Any) -> Tensor:
    return F.conv2d(x, weight, bias, *sizes)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *sizes = inputs
    ctx.save_for_backward(weight, *([x] if ctx.needs_input_grad[1] else []))
    ctx.x_shape, ctx.sizes = x.shape, sizes


def _conv2d_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    weight, *rest = ctx.saved_tensors
    stride, padding, dilation, groups = ctx.sizes
    grads = conv2d_backward(
        dy, rest[0] if rest else None, weight, x_shape=ctx.x_shape, stride=stride, padding=padding, dilation=dilation,
        groups=groups, wanted=ctx.needs_input_grad[:3],
    )  # fmt: skip
    return *grads, None, None, None, None


_frozen_conv2d.register_autograd(_conv2d_backward, setup_context=_keep)


@torch.library.custom_op("fastcraft::frozen_linear", mutates_args=())
def _frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


@_frozen_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    weight, *rest = ctx.saved_tensors
    return linear_backward(dy, rest[0] if rest else None, weight, wanted=ctx.needs_input_grad[:3])


_frozen_linear.register_autograd(_linear_backward, setup_context=_keep)
