# mypy: allow-untyped-defs
"""One launch each way for small planes: a program holds whole groups of one sample in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcraft_kernels.group_norm_silu.kernel_tile import (
    activate,
    activation_gradient,
    load_shift,
    load_tile,
    store_tile,
)
from fastcraft_kernels.group_norm_silu.plan import SmallPlan


@triton.jit
def _group_mean(values, size, WIDTH: tl.constexpr, OWNED: tl.constexpr):
    """Sums of channels ``(TILE_C,)`` -> the mean of each group ``(OWNED,)`` and the same spread over its channels."""
    chosen = (tl.arange(0, values.shape[0]) // WIDTH)[None, :] == tl.arange(0, OWNED)[:, None]
    means = tl.sum(tl.where(chosen, values[None, :], 0.0), 1) / size
    return means, tl.sum(tl.where(chosen, means[:, None], 0.0), 0)


@triton.jit
def _small_forward_kernel(
    x_ptr, residual_ptr, shift_ptr, weight_ptr, bias_ptr, total_ptr, y_ptr, mean_ptr, rstd_ptr,
    shift_stride, num_rows, C, eps,
    WIDTH: tl.constexpr, OWNED: tl.constexpr, SILU: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    first, n = tl.program_id(0) * OWNED, tl.program_id(1).to(tl.int64)
    start = first * WIDTH
    base = n * num_rows * C + start
    cols, rows = tl.arange(0, TILE_C), tl.arange(0, TILE_ROWS)
    width: tl.constexpr = OWNED * WIDTH
    h = load_tile(x_ptr + base, rows, num_rows, cols, width, C).to(tl.float32)
    h += load_shift(shift_ptr, n, shift_stride, cols + start, tl.minimum(start + width, C))[None, :]
    if residual_ptr is not None:
        h += load_tile(residual_ptr + base, rows, num_rows, cols, width, C).to(tl.float32)
        total = h.to(total_ptr.dtype.element_ty)
        store_tile(total_ptr + base, total, rows, num_rows, cols, width, C)
        h = total.to(tl.float32)
    real = (rows < num_rows)[:, None] & (cols < width)[None, :]
    size = num_rows * (WIDTH * 1.0)
    means, mean = _group_mean(tl.sum(tl.where(real, h, 0.0), 0), size, WIDTH, OWNED)
    d = tl.where(real, h - mean[None, :], 0.0)
    variances, variance = _group_mean(tl.sum(d * d, 0), size, WIDTH, OWNED)
    groups = n * (C // WIDTH) + first + tl.arange(0, OWNED)
    tl.store(mean_ptr + groups, means)
    tl.store(rstd_ptr + groups, 1.0 / tl.sqrt(variances + eps))
    weight = tl.load(weight_ptr + start + cols, mask=cols < width, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + start + cols, mask=cols < width, other=0.0).to(tl.float32)
    z = d * (weight / tl.sqrt(variance + eps))[None, :] + bias[None, :]
    store_tile(y_ptr + base, activate(z, SILU), rows, num_rows, cols, width, C)


@triton.jit
def _small_backward_kernel(
    dy_ptr, d_total_ptr, h_ptr, shift_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr,
    dx_ptr, d_bias_ptr, d_weight_ptr, d_shift_ptr, shift_stride, num_rows, C,
    WIDTH: tl.constexpr, OWNED: tl.constexpr, SILU: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    first, n = tl.program_id(0) * OWNED, tl.program_id(1).to(tl.int64)
    start = first * WIDTH
    base = n * num_rows * C + start
    cols, rows = tl.arange(0, TILE_C), tl.arange(0, TILE_ROWS)
    width: tl.constexpr = OWNED * WIDTH
    inside = cols < width
    group = n * (C // WIDTH) + first + cols // WIDTH
    center = tl.load(mean_ptr + group, mask=inside, other=0.0)
    center -= load_shift(shift_ptr, n, shift_stride, cols + start, tl.minimum(start + width, C))
    rstd = tl.load(rstd_ptr + group, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + start + cols, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + start + cols, mask=inside, other=0.0).to(tl.float32)
    h = load_tile(h_ptr + base, rows, num_rows, cols, width, C).to(tl.float32)
    dy = load_tile(dy_ptr + base, rows, num_rows, cols, width, C).to(tl.float32)
    normal = (h - center[None, :]) * rstd[None, :]
    dz = activation_gradient(dy, normal * weight[None, :] + bias[None, :], SILU)  # zero outside, as dy is
    dz_sum, dz_normal_sum = tl.sum(dz, 0), tl.sum(dz * normal, 0)
    size = num_rows * (WIDTH * 1.0)
    _, mean_dz = _group_mean(weight * dz_sum, size, WIDTH, OWNED)
    _, mean_dz_normal = _group_mean(weight * dz_normal_sum, size, WIDTH, OWNED)
    dx = rstd[None, :] * (weight[None, :] * dz - mean_dz[None, :] - normal * mean_dz_normal[None, :])
    if d_total_ptr is not None:
        dx += load_tile(d_total_ptr + base, rows, num_rows, cols, width, C).to(tl.float32)
    store_tile(dx_ptr + base, dx, rows, num_rows, cols, width, C)
    slot = n * C + start + cols
    if d_weight_ptr is not None:
        tl.store(d_bias_ptr + slot, dz_sum, mask=inside)
        tl.store(d_weight_ptr + slot, dz_normal_sum, mask=inside)
    if d_shift_ptr is not None:
        tl.store(d_shift_ptr + slot, tl.sum(tl.where((rows < num_rows)[:, None], dx, 0.0), 0), mask=inside)


def _constants(plan: SmallPlan, width: int, silu: bool) -> dict[str, int | bool]:
    return {
        "WIDTH": width,
        "OWNED": plan.num_owned,
        "SILU": silu,
        "TILE_ROWS": plan.tile_rows,
        "TILE_C": plan.tile_channels,
        "num_warps": plan.num_warps,
    }


def small_forward(
    plan: SmallPlan, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, residual: Tensor | None,
    total: Tensor | None, y: Tensor, mean: Tensor, rstd: Tensor, eps: float, silu: bool,
) -> None:  # fmt: skip
    """Fill ``total`` (if there is a residual), ``y``, ``mean`` and ``rstd``; planes are ``(N, S, C)``."""
    num_samples, num_rows, channels = x.shape
    num_groups = mean.shape[1]
    _small_forward_kernel[(num_groups // plan.num_owned, num_samples)](
        x, residual, shift, weight, bias, total, y, mean, rstd,
        0 if shift is None else shift.stride(0), num_rows, channels, eps,
        **_constants(plan, channels // num_groups, silu),
    )  # fmt: skip


def small_backward(
    plan: SmallPlan, dy: Tensor, d_total: Tensor | None, h: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None,
    mean: Tensor, rstd: Tensor, dx: Tensor, silu: bool, affine_grad: bool, shift_grad: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Fill ``dx``; returns sums ``(2, N, C)`` of dz and dz * normal, and ``d_shift`` ``(N, C)``, where wanted."""
    num_samples, num_rows, channels = h.shape
    num_groups = mean.shape[1]
    parts = h.new_empty((2, num_samples, channels), dtype=torch.float32) if affine_grad else None
    d_shift = h.new_empty((num_samples, channels), dtype=torch.float32) if shift_grad else None
    d_bias, d_weight = (None, None) if parts is None else (parts[0], parts[1])
    _small_backward_kernel[(num_groups // plan.num_owned, num_samples)](
        dy, d_total, h, shift, weight, bias, mean, rstd, dx, d_bias, d_weight, d_shift,
        0 if shift is None else shift.stride(0), num_rows, channels,
        **_constants(plan, channels // num_groups, silu),
    )  # fmt: skip
    return parts, d_shift
