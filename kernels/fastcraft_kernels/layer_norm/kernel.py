# mypy: allow-untyped-defs
"""The Triton path: a program holds whole rows in registers, arithmetic in float32.

A row is cut into the largest power of two and a tail (320 = 256 + 64): padding it to the next power of two would leave
more than a third of the lanes idle. Only a trainable affine makes a program take several blocks of rows, so that its
partial sums stay few; every partial has one writer, and two runs are bit-equal.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcraft_kernels.launch import ceil_div, device_facts, device_guard, largest_power_of_2, next_power_of_2

PROGRAM_ELEMENTS = 2560
BYTES_A_WARP = 1024  # two 16-byte loads a thread
PROGRAMS_PER_SM = 4


@triton.jit
def _load(ptr, rows, num_rows, cols, WIDTH: tl.constexpr):
    mask = (rows < num_rows)[:, None] & (cols < WIDTH)[None, :]
    return tl.load(ptr + rows[:, None] * WIDTH + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, values, rows, num_rows, cols, WIDTH: tl.constexpr):
    mask = (rows < num_rows)[:, None] & (cols < WIDTH)[None, :]
    tl.store(ptr + rows[:, None] * WIDTH + cols[None, :], values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_row(ptr, cols, WIDTH: tl.constexpr):
    return tl.load(ptr + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _add(x_ptr, residual_ptr, total_ptr, rows, num_rows, cols, WIDTH: tl.constexpr):
    """A piece of x; with a residual of their sum, rounded as it is written to memory."""
    h = _load(x_ptr, rows, num_rows, cols, WIDTH)
    if residual_ptr is not None:
        total = (h + _load(residual_ptr, rows, num_rows, cols, WIDTH)).to(total_ptr.dtype.element_ty)
        _store(total_ptr, total, rows, num_rows, cols, WIDTH)
        h = total.to(tl.float32)
    return h


@triton.jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, total_ptr, y_ptr, mean_ptr, rstd_ptr, num_rows, eps,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.arange(0, HEAD)
    a = _add(x_ptr, residual_ptr, total_ptr, rows, num_rows, head, WIDTH)
    sums = tl.sum(a, 1)
    if TAIL > 0:
        tail = HEAD + tl.arange(0, TAIL)
        b = _add(x_ptr, residual_ptr, total_ptr, rows, num_rows, tail, WIDTH)
        sums += tl.sum(b, 1)
    mean = sums / WIDTH
    a -= mean[:, None]
    squares = tl.sum(a * a, 1)
    if TAIL > 0:
        b = tl.where((tail < WIDTH)[None, :], b - mean[:, None], 0.0)
        squares += tl.sum(b * b, 1)
    rstd = 1.0 / tl.sqrt(squares / WIDTH + eps)
    tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
    y = a * rstd[:, None] * _load_row(weight_ptr, head, WIDTH) + _load_row(bias_ptr, head, WIDTH)
    _store(y_ptr, y, rows, num_rows, head, WIDTH)
    if TAIL > 0:
        y_tail = b * rstd[:, None] * _load_row(weight_ptr, tail, WIDTH) + _load_row(bias_ptr, tail, WIDTH)
        _store(y_ptr, y_tail, rows, num_rows, tail, WIDTH)


@triton.jit
def _scaled(h_ptr, weight_ptr, mean, rstd, dy, rows, num_rows, cols, WIDTH: tl.constexpr):
    """The normalised input and weight * dy of one piece; both are zero beyond the row."""
    normal = (_load(h_ptr, rows, num_rows, cols, WIDTH) - mean[:, None]) * rstd[:, None]
    return tl.where((cols < WIDTH)[None, :], normal, 0.0), dy * _load_row(weight_ptr, cols, WIDTH)


@triton.jit
def _store_dx(dx_ptr, d_total_ptr, dx, rows, num_rows, cols, WIDTH: tl.constexpr):
    if d_total_ptr is not None:
        dx += _load(d_total_ptr, rows, num_rows, cols, WIDTH)
    _store(dx_ptr, dx, rows, num_rows, cols, WIDTH)


@triton.jit
def _backward_kernel(
    dy_ptr, d_total_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, d_weight_ptr, d_bias_ptr, num_rows, num_blocks,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (dn - mean(dn) - normal * mean(dn * normal)) with dn = weight * dy, means over the row."""
    head, tail = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL if TAIL > 0 else 1)
    if d_weight_ptr is not None:
        d_weight = tl.zeros([ROWS, HEAD], tl.float32)
        d_bias = tl.zeros([ROWS, HEAD], tl.float32)
        d_weight_tail = tl.zeros([ROWS, TAIL if TAIL > 0 else 1], tl.float32)
        d_bias_tail = tl.zeros([ROWS, TAIL if TAIL > 0 else 1], tl.float32)
    for block in tl.range(0, num_blocks):
        rows = (tl.program_id(0).to(tl.int64) * num_blocks + block) * ROWS + tl.arange(0, ROWS)
        mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
        dy = _load(dy_ptr, rows, num_rows, head, WIDTH)
        normal, dn = _scaled(h_ptr, weight_ptr, mean, rstd, dy, rows, num_rows, head, WIDTH)
        sum_dn, sum_dn_normal = tl.sum(dn, 1), tl.sum(dn * normal, 1)
        if TAIL > 0:
            dy_tail = _load(dy_ptr, rows, num_rows, tail, WIDTH)
            normal_tail, dn_tail = _scaled(h_ptr, weight_ptr, mean, rstd, dy_tail, rows, num_rows, tail, WIDTH)
            sum_dn += tl.sum(dn_tail, 1)
            sum_dn_normal += tl.sum(dn_tail * normal_tail, 1)
        if d_weight_ptr is not None:
            d_weight += dy * normal
            d_bias += dy
            if TAIL > 0:
                d_weight_tail += dy_tail * normal_tail
                d_bias_tail += dy_tail
        mean_dn, mean_dn_normal = (sum_dn / WIDTH)[:, None], (sum_dn_normal / WIDTH)[:, None]
        dx = rstd[:, None] * (dn - mean_dn - normal * mean_dn_normal)
        _store_dx(dx_ptr, d_total_ptr, dx, rows, num_rows, head, WIDTH)
        if TAIL > 0:
            dx_tail = rstd[:, None] * (dn_tail - mean_dn - normal_tail * mean_dn_normal)
            _store_dx(dx_ptr, d_total_ptr, dx_tail, rows, num_rows, tail, WIDTH)
    if d_weight_ptr is not None:
        slot = tl.program_id(0) * WIDTH
        tl.store(d_weight_ptr + slot + head, tl.sum(d_weight, 0), mask=head < WIDTH)
        tl.store(d_bias_ptr + slot + head, tl.sum(d_bias, 0), mask=head < WIDTH)
        if TAIL > 0:
            tl.store(d_weight_ptr + slot + tail, tl.sum(d_weight_tail, 0), mask=tail < WIDTH)
            tl.store(d_bias_ptr + slot + tail, tl.sum(d_bias_tail, 0), mask=tail < WIDTH)


def _constants(x: Tensor) -> dict[str, int]:
    width = x.shape[-1]
    head = largest_power_of_2(width)
    rows = min(largest_power_of_2(max(PROGRAM_ELEMENTS // width, 1)), next_power_of_2(x.numel() // width))
    return {
        "WIDTH": width,
        "HEAD": head,
        "TAIL": next_power_of_2(width - head) if width > head else 0,
        "ROWS": rows,
        "num_warps": max(1, min(16, rows * head * x.element_size() // BYTES_A_WARP)),
    }


def _rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1, x.shape[-1]).contiguous()


def layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """As `reference.layer_norm_forward`."""
    width = x.shape[-1]
    num_rows = x.numel() // width
    total = None if residual is None else x.new_empty(x.shape)
    y = x.new_empty(x.shape)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    constants = _constants(x)
    with device_guard(x):
        _forward_kernel[(ceil_div(num_rows, constants["ROWS"]),)](
            _rows(x), _rows(residual), weight.contiguous(), bias.contiguous(), total, y, mean, rstd, num_rows, eps,
            **constants,
        )  # fmt: skip
    return total, y, mean, rstd


def layer_norm_backward(
    d_out: Tensor, d_total: Tensor | None, h: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, affine_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `reference.layer_norm_backward`."""
    width = h.shape[-1]
    num_rows = h.numel() // width
    dx = h.new_empty(h.shape)
    constants = _constants(h)
    programs, num_blocks, d_weight, d_bias = ceil_div(num_rows, constants["ROWS"]), 1, None, None
    if affine_grad:
        num_blocks = ceil_div(programs, PROGRAMS_PER_SM * device_facts(h.device).num_sms)
        programs = ceil_div(programs, num_blocks)
        d_weight, d_bias = (h.new_empty((programs, width), dtype=torch.float32) for _ in range(2))
    with device_guard(h):
        _backward_kernel[(programs,)](
            _rows(d_out), _rows(d_total), _rows(h), weight.contiguous(), mean, rstd, dx, d_weight, d_bias,
            num_rows, num_blocks, **constants,
        )  # fmt: skip
    if d_weight is None or d_bias is None:
        return dx, None, None
    return dx, d_weight.sum(0), d_bias.sum(0)
