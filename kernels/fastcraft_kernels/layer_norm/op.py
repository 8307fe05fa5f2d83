"""The public op, its checks, and its registration as ``torch.ops.fastcraft.layer_norm``."""

from typing import Any

import torch
from torch import Tensor

from fastcraft_kernels.backend import uses_triton
from fastcraft_kernels.layer_norm import reference

WIDEST = 16_384


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer normalisation of ``x + residual`` over the last dimension.

    Args:
        x: ``(..., C)`` float32/float16/bfloat16 (float64 in plain PyTorch), any strides, C at most 16384.
        weight, bias: ``(C,)``, any floating dtype.
        eps: added to the variance, positive.
        residual: shape and dtype of ``x``.

    Returns:
        ``out``, or ``(total, out)`` with a residual, where ``total = x + residual``, rounded to ``x``'s dtype. Both
        have ``x``'s shape and dtype and are contiguous.

    Raises:
        ValueError: an argument of another shape, dtype or device than said here.

    Saves for backward: what was normalised (``total``, or ``x``), ``weight``, and mean and 1 / standard deviation of
    each row in float32. Gradients of ``weight`` and ``bias`` are computed only where they are required. Two runs are
    bit-equal.
    Source: Ba, Kiros and Hinton 2016, arXiv:1607.06450, section 3.
    """
    _check(x, weight, bias, eps, residual)
    total, out, _, _ = _layer_norm(x, weight, bias, residual, eps)
    return out if residual is None else (total, out)


def _check(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None) -> None:
    if x.ndim < 1 or x.numel() == 0:
        raise ValueError(f"layer_norm: x must be (..., C) and not empty, got shape {tuple(x.shape)}")
    width = x.shape[-1]
    if width > WIDEST:
        raise ValueError(f"layer_norm: the last dimension of x must be at most {WIDEST}, got {width}")
    if eps <= 0:
        raise ValueError(f"layer_norm: eps must be positive, got {eps}")
    expected = {"x": x.shape, "weight": (width,), "bias": (width,), "residual": x.shape}
    for name, tensor in {"x": x, "weight": weight, "bias": bias, "residual": residual}.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"layer_norm: {name} must be of a floating dtype, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"layer_norm: {name} must be on x's device {x.device}, got {tensor.device}")
        if tensor.shape != expected[name]:
            raise ValueError(f"layer_norm: {name} must have shape {tuple(expected[name])}, got {tuple(tensor.shape)}")
    if residual is not None and residual.dtype != x.dtype:
        raise ValueError(f"layer_norm: residual must have x's dtype {x.dtype}, got {residual.dtype}")


@torch.library.custom_op("fastcraft::layer_norm", mutates_args=())
def _layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if uses_triton("layer_norm", x):
        from fastcraft_kernels.layer_norm.kernel import layer_norm_forward as forward
    else:
        forward = reference.layer_norm_forward
    total, out, mean, rstd = forward(x, weight, bias, residual, eps)
    return x.new_empty(0) if total is None else total, out, mean, rstd


@_layer_norm.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=wide) for _ in range(2))
    return x.new_empty(0 if residual is None else x.shape), x.new_empty(x.shape), mean, rstd


@torch.library.custom_op("fastcraft::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    d_out: Tensor, d_total: Tensor | None, h: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor,
    affine_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``dx``, then the gradients of weight and bias: empty where not wanted."""
    if uses_triton("layer_norm", h):
        from fastcraft_kernels.layer_norm.kernel import layer_norm_backward as backward
    else:
        backward = reference.layer_norm_backward
    dx, d_weight, d_bias = backward(d_out, d_total, h, weight, mean, rstd, affine_grad)
    return (
        dx,
        h.new_empty(0) if d_weight is None else d_weight.to(weight.dtype),
        h.new_empty(0) if d_bias is None else d_bias.to(bias.dtype),
    )


@_layer_norm_backward.register_fake
def _(
    d_out: Tensor, d_total: Tensor | None, h: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor,
    affine_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    size = weight.shape if affine_grad else (0,)
    return (
        h.new_empty(h.shape),
        h.new_empty(size, dtype=weight.dtype if affine_grad else h.dtype),
        h.new_empty(size, dtype=bias.dtype if affine_grad else h.dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, _ = inputs
    total, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.has_residual = residual is not None
    ctx.save_for_backward(total if ctx.has_residual else x, weight, bias, mean, rstd)


def _backward(ctx: Any, d_total: Tensor | None, d_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
    d_total = d_total if ctx.has_residual else None
    if d_out is None:  # only the sum was used
        return d_total, None, None, d_total if needs_residual else None, None
    dx, d_weight, d_bias = _layer_norm_backward(d_out, d_total, *ctx.saved_tensors, needs_weight or needs_bias)
    return (
        dx if needs_x else None,
        d_weight if needs_weight else None,
        d_bias if needs_bias else None,
        dx if needs_residual else None,
        None,
    )


_layer_norm.register_autograd(_backward, setup_context=_setup_context)
