# mypy: allow-untyped-defs
"""The Triton path: one launch each way over flat tiles, arithmetic in float32."""

import triton
import triton.language as tl
from torch import Tensor

from fastcraft_kernels.launch import ceil_div, device_guard, next_power_of_2

TILE_ELEMENTS = 2048  # sixteen for each thread of four warps
WIDEST_TILE = 1024
NARROWEST_TILE = 64

SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY_AT_ZERO = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit
def _tile(num_rows, F, TILES_A_ROW: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_F: tl.constexpr):
    """Rows, columns and mask of this program; consecutive programs read consecutive columns."""
    pid = tl.program_id(0)
    rows = (pid // TILES_A_ROW).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    cols = pid % TILES_A_ROW * TILE_F + tl.arange(0, TILE_F)
    return rows[:, None], cols[None, :], (rows < num_rows)[:, None] & (cols < F)[None, :]


@triton.jit
def _forward_kernel(
    x_ptr, y_ptr, num_rows, F, TILES_A_ROW: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_F: tl.constexpr
):  # fmt: skip
    rows, cols, mask = _tile(num_rows, F, TILES_A_ROW, TILE_ROWS, TILE_F)
    value = tl.load(x_ptr + rows * (2 * F) + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + rows * (2 * F) + F + cols, mask=mask, other=0.0).to(tl.float32)
    y = value * gate * (0.5 + 0.5 * tl.erf(gate * SQRT_HALF))
    tl.store(y_ptr + rows * F + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr, x_ptr, dx_ptr, num_rows, F, TILES_A_ROW: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_F: tl.constexpr
):  # fmt: skip
    rows, cols, mask = _tile(num_rows, F, TILES_A_ROW, TILE_ROWS, TILE_F)
    value = tl.load(x_ptr + rows * (2 * F) + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + rows * (2 * F) + F + cols, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + rows * F + cols, mask=mask, other=0.0).to(tl.float32)
    cdf = 0.5 + 0.5 * tl.erf(gate * SQRT_HALF)
    density = DENSITY_AT_ZERO * tl.exp(-0.5 * gate * gate)
    d_value = dy * gate * cdf
    d_gate = dy * value * (cdf + gate * density)
    tl.store(dx_ptr + rows * (2 * F) + cols, d_value.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dx_ptr + rows * (2 * F) + F + cols, d_gate.to(dx_ptr.dtype.element_ty), mask=mask)


def _launch(rows: Tensor) -> tuple[int, tuple[int, int], dict[str, int]]:
    """Programs, ``(rows, F)``, and tile constants: a tile that divides F exactly where F has a usable power of two."""
    num_rows, width = rows.shape[0], rows.shape[1] // 2
    divisor = width & -width
    tile = min(divisor if divisor >= NARROWEST_TILE else next_power_of_2(width), WIDEST_TILE)
    tile_rows = min(TILE_ELEMENTS // tile, next_power_of_2(num_rows))
    tiles = ceil_div(width, tile)
    constants = {"TILES_A_ROW": tiles, "TILE_ROWS": tile_rows, "TILE_F": tile, "num_warps": 4}
    return tiles * ceil_div(num_rows, tile_rows), (num_rows, width), constants


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def geglu_forward(x: Tensor) -> Tensor:
    """As `reference.geglu_forward`."""
    rows = _rows(x)
    programs, sizes, constants = _launch(rows)
    y = x.new_empty(*x.shape[:-1], sizes[1])
    with device_guard(x):
        _forward_kernel[(programs,)](rows, y, *sizes, **constants)
    return y


def geglu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """As `reference.geglu_backward`."""
    rows = _rows(x)
    programs, sizes, constants = _launch(rows)
    dx = x.new_empty(x.shape)
    with device_guard(x):
        _backward_kernel[(programs,)](_rows(dy), rows, dx, *sizes, **constants)
    return dx
