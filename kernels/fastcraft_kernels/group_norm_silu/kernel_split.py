# mypy: allow-untyped-defs
"""Two launches each way: partial sums of every channel by (tile, split, sample), then merge and apply on the same grid.

Every partial has one writer and is merged in a fixed order: no atomics, two runs are bit-equal. Each loop asks for its
next tile before it computes on the present one, so that two tiles are in flight.
"""

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
from fastcraft_kernels.group_norm_silu.plan import SplitPlan


@triton.jit
def _stats_kernel(
    x_ptr, residual_ptr, shift_ptr, total_ptr, mean_ptr, m2_ptr,
    shift_stride, num_rows, C, split_rows, num_splits, TILE_ROWS: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each channel over one split; writes x + shift + residual if asked to.

    Sums are taken around the split's first row: squares of a channel far from zero would lose its variance.
    """
    split, n = tl.program_id(1), tl.program_id(2).to(tl.int64)
    base = (n * num_rows + split * split_rows) * C
    limit = tl.minimum(split_rows, num_rows - split * split_rows)
    cols = tl.program_id(0) * TILE_C + tl.arange(0, TILE_C)
    rows = tl.arange(0, TILE_ROWS)
    shift = load_shift(shift_ptr, n, shift_stride, cols, C)
    pivot = tl.load(x_ptr + base + cols, mask=cols < C, other=0.0).to(tl.float32) + shift
    x = load_tile(x_ptr + base, rows, limit, cols, C, C)
    if residual_ptr is not None:
        pivot += tl.load(residual_ptr + base + cols, mask=cols < C, other=0.0).to(tl.float32)
        r = load_tile(residual_ptr + base, rows, limit, cols, C, C)
    sums = tl.zeros([TILE_ROWS, TILE_C], tl.float32)
    squares = tl.zeros([TILE_ROWS, TILE_C], tl.float32)
    for start in tl.range(0, limit, TILE_ROWS):
        here = start + rows
        h = x.to(tl.float32) + shift[None, :]
        x = load_tile(x_ptr + base, here + TILE_ROWS, limit, cols, C, C)
        if residual_ptr is not None:
            total = (h + r.to(tl.float32)).to(total_ptr.dtype.element_ty)
            r = load_tile(residual_ptr + base, here + TILE_ROWS, limit, cols, C, C)
            store_tile(total_ptr + base, total, here, limit, cols, C, C)
            h = total.to(tl.float32)
        d = tl.where((here < limit)[:, None], h - pivot[None, :], 0.0)
        sums += d
        squares += d * d
    count = limit.to(tl.float32)
    mean = tl.sum(sums, 0) / count
    m2 = tl.maximum(tl.sum(squares, 0) - mean * mean * count, 0.0)
    slot = (n * num_splits + split) * C + cols
    tl.store(mean_ptr + slot, pivot + mean, mask=cols < C)
    tl.store(m2_ptr + slot, m2, mask=cols < C)


@triton.jit
def _partial_slots(n, first_group, C, num_splits, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr,
                   MAX_GROUPS: tl.constexpr, MAX_SPLITS: tl.constexpr):  # fmt: skip
    """Where the tile's groups have partials ``(MAX_SPLITS, MAX_GROUPS, WIDTH_PAD)``, which exist, and channels."""
    member = tl.arange(0, WIDTH_PAD)
    channels = (first_group + tl.arange(0, MAX_GROUPS))[:, None] * WIDTH + member[None, :]
    split = tl.arange(0, MAX_SPLITS)
    real = ((member < WIDTH)[None, :] & (channels < C))[None, :, :] & (split < num_splits)[:, None, None]
    return (n * num_splits + split)[:, None, None] * C + channels[None, :, :], real, channels


@triton.jit
def _sum_groups(values):
    return tl.sum(tl.sum(values, 2), 0)  # (MAX_SPLITS, MAX_GROUPS, WIDTH_PAD) -> (MAX_GROUPS,)


@triton.jit
def _spread(values, first_group, cols, WIDTH: tl.constexpr, MAX_GROUPS: tl.constexpr):
    """A value for each group -> a value for each channel of the tile."""
    chosen = (cols // WIDTH)[None, :] == (first_group + tl.arange(0, MAX_GROUPS))[:, None]
    return tl.sum(tl.where(chosen, values[:, None], 0.0), 0)


@triton.jit
def _apply_kernel(
    h_ptr, shift_ptr, weight_ptr, bias_ptr, mean_parts_ptr, m2_parts_ptr, y_ptr, mean_ptr, rstd_ptr,
    shift_stride, num_rows, C, split_rows, num_splits, eps,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, MAX_GROUPS: tl.constexpr, MAX_SPLITS: tl.constexpr,
    SILU: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    """Merge the partials of the tile's groups (Chan et al. 1983), normalise, activate."""
    split, n = tl.program_id(1), tl.program_id(2).to(tl.int64)
    base = (n * num_rows + split * split_rows) * C
    limit = tl.minimum(split_rows, num_rows - split * split_rows)
    cols = tl.program_id(0) * TILE_C + tl.arange(0, TILE_C)
    rows = tl.arange(0, TILE_ROWS)
    h = load_tile(h_ptr + base, rows, limit, cols, C, C)

    first = tl.program_id(0) * TILE_C // WIDTH
    slots, real, _ = _partial_slots(n, first, C, num_splits, WIDTH, WIDTH_PAD, MAX_GROUPS, MAX_SPLITS)
    parts = tl.load(mean_parts_ptr + slots, mask=real, other=0.0)
    m2_parts = tl.load(m2_parts_ptr + slots, mask=real, other=0.0)
    counts = tl.minimum(split_rows, num_rows - tl.arange(0, MAX_SPLITS) * split_rows).to(tl.float32)
    counts = tl.where(real, counts[:, None, None], 0.0)
    size = num_rows * (WIDTH * 1.0)
    mean = _sum_groups(counts * parts) / size  # (MAX_GROUPS,)
    off = parts - mean[None, :, None]
    rstd = 1.0 / tl.sqrt(_sum_groups(m2_parts + counts * off * off) / size + eps)
    groups = first + tl.arange(0, MAX_GROUPS)
    # A group that straddles two tiles is written by the tile that holds its first channel.
    begin = tl.program_id(0) * TILE_C
    owned = (groups * WIDTH >= begin) & (groups * WIDTH < tl.minimum(begin + TILE_C, C))
    if split == 0:
        tl.store(mean_ptr + n * (C // WIDTH) + groups, mean, mask=owned)
        tl.store(rstd_ptr + n * (C // WIDTH) + groups, rstd, mask=owned)

    center = _spread(mean, first, cols, WIDTH, MAX_GROUPS) - load_shift(shift_ptr, n, shift_stride, cols, C)
    scale = _spread(rstd, first, cols, WIDTH, MAX_GROUPS)
    scale *= tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    offset = tl.load(bias_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    for start in tl.range(0, limit, TILE_ROWS):
        here = start + rows
        z = (h.to(tl.float32) - center[None, :]) * scale[None, :] + offset[None, :]
        h = load_tile(h_ptr + base, here + TILE_ROWS, limit, cols, C, C)
        store_tile(y_ptr + base, activate(z, SILU), here, limit, cols, C, C)


@triton.jit
def _gradient_sums_kernel(
    dy_ptr, d_total_ptr, h_ptr, shift_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr,
    d_bias_ptr, d_weight_ptr, normal_ptr, d_total_sum_ptr,
    shift_stride, num_rows, C, split_rows, num_splits,
    WIDTH: tl.constexpr, SILU: tl.constexpr, SHIFT_GRAD: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    """Over one split, for each channel: the sums of dz and of dz * normalised input, z being the norm's output.

    With SHIFT_GRAD also those of the normalised input and of the gradient that passes by the norm.
    """
    split, n = tl.program_id(1), tl.program_id(2).to(tl.int64)
    base = (n * num_rows + split * split_rows) * C
    limit = tl.minimum(split_rows, num_rows - split * split_rows)
    cols = tl.program_id(0) * TILE_C + tl.arange(0, TILE_C)
    rows = tl.arange(0, TILE_ROWS)
    h = load_tile(h_ptr + base, rows, limit, cols, C, C)
    dy = load_tile(dy_ptr + base, rows, limit, cols, C, C)
    group = n * (C // WIDTH) + cols // WIDTH
    center = tl.load(mean_ptr + group, mask=cols < C, other=0.0) - load_shift(shift_ptr, n, shift_stride, cols, C)
    rstd = tl.load(rstd_ptr + group, mask=cols < C, other=0.0)
    weight = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    dz_sum = tl.zeros([TILE_ROWS, TILE_C], tl.float32)
    dz_normal_sum = tl.zeros([TILE_ROWS, TILE_C], tl.float32)
    normal_sum = tl.zeros([TILE_ROWS, TILE_C], tl.float32)
    d_total_sum = tl.zeros([TILE_ROWS, TILE_C], tl.float32)
    for start in tl.range(0, limit, TILE_ROWS):
        here = start + rows
        normal = (h.to(tl.float32) - center[None, :]) * rstd[None, :]
        dz = activation_gradient(dy.to(tl.float32), normal * weight[None, :] + bias[None, :], SILU)
        h = load_tile(h_ptr + base, here + TILE_ROWS, limit, cols, C, C)
        dy = load_tile(dy_ptr + base, here + TILE_ROWS, limit, cols, C, C)
        dz_sum += dz  # a row outside has dy = 0, hence dz = 0
        dz_normal_sum += dz * normal
        if SHIFT_GRAD:
            normal_sum += tl.where((here < limit)[:, None], normal, 0.0)
            if d_total_ptr is not None:
                d_total_sum += load_tile(d_total_ptr + base, here, limit, cols, C, C).to(tl.float32)
    slot = (n * num_splits + split) * C + cols
    tl.store(d_bias_ptr + slot, tl.sum(dz_sum, 0), mask=cols < C)
    tl.store(d_weight_ptr + slot, tl.sum(dz_normal_sum, 0), mask=cols < C)
    if SHIFT_GRAD:
        tl.store(normal_ptr + slot, tl.sum(normal_sum, 0), mask=cols < C)
        tl.store(d_total_sum_ptr + slot, tl.sum(d_total_sum, 0), mask=cols < C)


@triton.jit
def _input_gradient_kernel(
    dy_ptr, d_total_ptr, h_ptr, shift_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, d_bias_ptr, d_weight_ptr, dx_ptr,
    shift_stride, num_rows, C, split_rows, num_splits,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, MAX_GROUPS: tl.constexpr, MAX_SPLITS: tl.constexpr,
    SILU: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (weight * dz - mean(weight * dz) - normal * mean(weight * dz * normal)), means over the group."""
    split, n = tl.program_id(1), tl.program_id(2).to(tl.int64)
    base = (n * num_rows + split * split_rows) * C
    limit = tl.minimum(split_rows, num_rows - split * split_rows)
    cols = tl.program_id(0) * TILE_C + tl.arange(0, TILE_C)
    rows = tl.arange(0, TILE_ROWS)
    h = load_tile(h_ptr + base, rows, limit, cols, C, C)
    dy = load_tile(dy_ptr + base, rows, limit, cols, C, C)

    first = tl.program_id(0) * TILE_C // WIDTH
    slots, real, channels = _partial_slots(n, first, C, num_splits, WIDTH, WIDTH_PAD, MAX_GROUPS, MAX_SPLITS)
    dz_parts = tl.load(d_bias_ptr + slots, mask=real, other=0.0)
    dz_normal_parts = tl.load(d_weight_ptr + slots, mask=real, other=0.0)
    weights = tl.load(weight_ptr + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :, :]
    size = num_rows * (WIDTH * 1.0)
    mean_dz = _spread(_sum_groups(weights * dz_parts) / size, first, cols, WIDTH, MAX_GROUPS)
    mean_dz_normal = _spread(_sum_groups(weights * dz_normal_parts) / size, first, cols, WIDTH, MAX_GROUPS)

    group = n * (C // WIDTH) + cols // WIDTH
    center = tl.load(mean_ptr + group, mask=cols < C, other=0.0) - load_shift(shift_ptr, n, shift_stride, cols, C)
    rstd = tl.load(rstd_ptr + group, mask=cols < C, other=0.0)
    weight = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    for start in tl.range(0, limit, TILE_ROWS):
        here = start + rows
        normal = (h.to(tl.float32) - center[None, :]) * rstd[None, :]
        dz = activation_gradient(dy.to(tl.float32), normal * weight[None, :] + bias[None, :], SILU)
        h = load_tile(h_ptr + base, here + TILE_ROWS, limit, cols, C, C)
        dy = load_tile(dy_ptr + base, here + TILE_ROWS, limit, cols, C, C)
        dx = rstd[None, :] * (weight[None, :] * dz - mean_dz[None, :] - normal * mean_dz_normal[None, :])
        if d_total_ptr is not None:
            dx += load_tile(d_total_ptr + base, here, limit, cols, C, C).to(tl.float32)
        store_tile(dx_ptr + base, dx, here, limit, cols, C, C)


def _grid(plan: SplitPlan, x: Tensor) -> tuple[int, int, int]:
    return plan.num_tiles, plan.num_splits, x.shape[0]


def _merge_constants(plan: SplitPlan, width: int) -> dict[str, int]:
    return {
        "WIDTH": width,
        "WIDTH_PAD": triton.next_power_of_2(width),
        "MAX_GROUPS": plan.max_groups,
        "MAX_SPLITS": plan.max_splits,
    }


def split_forward(
    plan: SplitPlan, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, residual: Tensor | None,
    total: Tensor | None, y: Tensor, mean: Tensor, rstd: Tensor, eps: float, silu: bool,
) -> None:  # fmt: skip
    """Fill ``total`` (if there is a residual), ``y``, ``mean`` and ``rstd``; planes are ``(N, S, C)``."""
    num_samples, num_rows, channels = x.shape
    parts = x.new_empty((2, num_samples, plan.num_splits, channels), dtype=torch.float32)
    stride = 0 if shift is None else shift.stride(0)
    sizes = (stride, num_rows, channels, plan.split_rows, plan.num_splits)
    tile = {"TILE_ROWS": plan.tile_rows, "TILE_C": plan.tile_channels, "num_warps": plan.num_warps}
    _stats_kernel[_grid(plan, x)](x, residual, shift, total, parts[0], parts[1], *sizes, **tile)
    h, added = (x, shift) if total is None else (total, None)
    _apply_kernel[_grid(plan, x)](
        h, added, weight, bias, parts[0], parts[1], y, mean, rstd, *sizes, eps,
        SILU=silu, **_merge_constants(plan, channels // mean.shape[1]), **tile,
    )  # fmt: skip


def split_backward(
    plan: SplitPlan, dy: Tensor, d_total: Tensor | None, h: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None,
    mean: Tensor, rstd: Tensor, dx: Tensor, silu: bool, shift_grad: bool,
) -> Tensor:  # fmt: skip
    """Fill ``dx``; returns per-channel sums ``(2 or 4, N, splits, C)``: dz, dz * normal, normal, ``d_total``."""
    num_samples, num_rows, channels = h.shape
    parts = h.new_empty((4 if shift_grad else 2, num_samples, plan.num_splits, channels), dtype=torch.float32)
    extra = (parts[2], parts[3]) if shift_grad else (None, None)
    stride = 0 if shift is None else shift.stride(0)
    sizes = (stride, num_rows, channels, plan.split_rows, plan.num_splits)
    tile = {"TILE_ROWS": plan.tile_rows, "TILE_C": plan.tile_channels, "num_warps": plan.num_warps}
    width = channels // mean.shape[1]
    _gradient_sums_kernel[_grid(plan, h)](
        dy, d_total, h, shift, weight, bias, mean, rstd, parts[0], parts[1], *extra, *sizes,
        WIDTH=width, SILU=silu, SHIFT_GRAD=shift_grad, **tile,
    )  # fmt: skip
    _input_gradient_kernel[_grid(plan, h)](
        dy, d_total, h, shift, weight, bias, mean, rstd, parts[0], parts[1], dx, *sizes,
        SILU=silu, **_merge_constants(plan, width), **tile,
    )  # fmt: skip
    return parts
