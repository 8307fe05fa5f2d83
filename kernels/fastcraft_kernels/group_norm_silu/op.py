"""The public op, its checks, and its registration as ``torch.ops.fastcraft.group_norm_silu``."""

from typing import Any

import torch
from torch import Tensor

from fastcraft_kernels.backend import uses_triton
from fastcraft_kernels.group_norm_silu import reference
from fastcraft_kernels.group_norm_silu.rows import empty_rows, from_rows


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, *, num_groups: int, eps: float, silu: bool = True,
    shift: Tensor | None = None, residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Group normalisation of ``x + shift + residual``, then SiLU.

    Args:
        x: ``(N, C, *spatial)`` float32/float16/bfloat16 (float64 in plain PyTorch), any strides; channels-last
            (``torch.channels_last`` for 4 dimensions) is read in place, another layout is copied once.
        weight, bias: ``(C,)``, any floating dtype.
        num_groups: divides C.
        eps: added to the variance, positive.
        silu: whether ``z * sigmoid(z)`` follows the norm.
        shift: ``(N, C)``, added to every pixel before the norm: a time embedding, a convolution's bias. Without a
            residual the sum is never written to memory, nor rounded.
        residual: shape and dtype of ``x``.

    Returns:
        ``out``, or ``(total, out)`` with a residual, where ``total = x + shift + residual``, rounded once to ``x``'s
        dtype. Both have ``x``'s shape and dtype and are channels-last.

    Raises:
        ValueError: an argument of another shape, dtype or device than said here.

    Saves for backward: what was normalised (``total``, or ``x`` and ``shift``), ``weight``, ``bias``, and the groups'
    mean and 1 / standard deviation in float32. Gradients of ``weight``, ``bias`` and ``shift`` are computed only
    where they are required. Sums are in float32 and in a fixed order: two runs are bit-equal.
    Source: Wu and He 2018, arXiv:1803.08494; sums merged as in Chan, Golub and LeVeque 1983, "Algorithms for computing
    the sample variance".
    """
    _check(x, weight, bias, num_groups, eps, shift, residual)
    total, out, _, _ = _group_norm_silu(x, weight, bias, shift, residual, num_groups, eps, silu)
    return out if residual is None else (total, out)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, shift: Tensor | None, residual: Tensor | None
) -> None:
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(f"group_norm_silu: x must be (N, C, ...) and not empty, got shape {tuple(x.shape)}")
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"group_norm_silu: num_groups must divide the {channels} channels of x, got {num_groups}")
    if eps <= 0:
        raise ValueError(f"group_norm_silu: eps must be positive, got {eps}")
    expected = {"weight": (channels,), "bias": (channels,), "shift": (x.shape[0], channels), "residual": x.shape}
    tensors = {"x": x, "weight": weight, "bias": bias, "shift": shift, "residual": residual}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"group_norm_silu: {name} must be of a floating dtype, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"group_norm_silu: {name} must be on x's device {x.device}, got {tensor.device}")
        if name in expected and tensor.shape != expected[name]:
            raise ValueError(
                f"group_norm_silu: {name} must have shape {tuple(expected[name])}, got {tuple(tensor.shape)}"
            )
    if residual is not None and residual.dtype != x.dtype:
        raise ValueError(f"group_norm_silu: residual must have x's dtype {x.dtype}, got {residual.dtype}")


@torch.library.custom_op("fastcraft::group_norm_silu", mutates_args=())
def _group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, residual: Tensor | None, num_groups: int,
    eps: float, silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if uses_triton("group_norm_silu", x):
        from fastcraft_kernels.group_norm_silu.kernel import group_norm_silu_forward as forward
    else:
        forward = reference.group_norm_silu_forward
    total, out, mean, rstd = forward(x, weight, bias, shift, residual, num_groups, eps, silu)
    return x.new_empty(0) if total is None else total, out, mean, rstd


@_group_norm_silu.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, residual: Tensor | None, num_groups: int,
    eps: float, silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    total = x.new_empty(0) if residual is None else from_rows(empty_rows(x), x.shape)
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, rstd = (x.new_empty((x.shape[0], num_groups), dtype=wide) for _ in range(2))
    return total, from_rows(empty_rows(x), x.shape), mean, rstd


@torch.library.custom_op("fastcraft::group_norm_silu_backward", mutates_args=())
def _group_norm_silu_backward(
    d_out: Tensor, d_total: Tensor | None, h: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None,
    mean: Tensor, rstd: Tensor, silu: bool, affine_grad: bool, shift_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``dx``, then the gradients of weight, bias and shift: empty where not wanted."""
    if uses_triton("group_norm_silu", h):
        from fastcraft_kernels.group_norm_silu.kernel import group_norm_silu_backward as backward
    else:
        backward = reference.group_norm_silu_backward
    dx, d_weight, d_bias, d_shift = backward(
        d_out, d_total, h, weight, bias, shift, mean, rstd, silu, affine_grad, shift_grad
    )
    return (
        dx,
        h.new_empty(0) if d_weight is None else d_weight.to(weight.dtype),
        h.new_empty(0) if d_bias is None else d_bias.to(bias.dtype),
        h.new_empty(0) if d_shift is None else d_shift,
    )


@_group_norm_silu_backward.register_fake
def _(
    d_out: Tensor, d_total: Tensor | None, h: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None,
    mean: Tensor, rstd: Tensor, silu: bool, affine_grad: bool, shift_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        from_rows(empty_rows(h), h.shape),
        torch.empty_like(weight) if affine_grad else h.new_empty(0),
        torch.empty_like(bias) if affine_grad else h.new_empty(0),
        mean.new_empty(h.shape[:2]) if shift_grad else h.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, shift, residual, _, _, ctx.silu = inputs
    total, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.has_residual = residual is not None
    ctx.shift_dtype = None if shift is None else shift.dtype
    h, added = (x, shift) if residual is None else (total, None)
    ctx.save_for_backward(h, weight, bias, added, mean, rstd)


def _backward(ctx: Any, d_total: Tensor | None, d_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    needs_x, needs_weight, needs_bias, needs_shift, needs_residual = ctx.needs_input_grad[:5]
    d_total = d_total if ctx.has_residual else None
    if d_out is None:  # only the sum was used
        d_shift = (
            None
            if d_total is None or not needs_shift
            else d_total.reshape(*d_total.shape[:2], -1).sum(2).to(ctx.shift_dtype)
        )
        return d_total, None, None, d_shift, d_total, None, None, None
    dx, d_weight, d_bias, d_shift = _group_norm_silu_backward(
        d_out, d_total, *ctx.saved_tensors, ctx.silu, needs_weight or needs_bias, needs_shift
    )
    return (
        dx if needs_x else None,
        d_weight if needs_weight else None,
        d_bias if needs_bias else None,
        d_shift.to(ctx.shift_dtype) if needs_shift else None,
        dx if needs_residual else None,
        None,
        None,
        None,
    )


_group_norm_silu.register_autograd(_backward, setup_context=_setup_context)
