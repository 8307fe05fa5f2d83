# mypy: allow-untyped-defs
"""What the one-launch and the two-launch kernels share: tiles of (rows, channels), SiLU and its gradient.

Everything is computed in float32: operands are widened as soon as they are loaded.
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(ptr, rows, num_rows, cols, num_cols, row_stride):
    """``(rows, cols)`` of a plane in its own dtype, zero outside."""
    mask = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    return tl.load(ptr + rows[:, None] * row_stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(ptr, values, rows, num_rows, cols, num_cols, row_stride):
    mask = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    tl.store(ptr + rows[:, None] * row_stride + cols[None, :], values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_shift(shift_ptr, n, shift_stride, cols, num_cols):
    """The per-channel constants that are added before the norm; zero where there are none."""
    if shift_ptr is None:
        shift = tl.zeros(cols.shape, tl.float32)
    else:
        shift = tl.load(shift_ptr + n * shift_stride + cols, mask=cols < num_cols, other=0.0).to(tl.float32)
    return shift


@triton.jit
def activate(z, SILU: tl.constexpr):
    if SILU:
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def activation_gradient(dy, z, SILU: tl.constexpr):
    """The gradient before the activation, given the one after it and its input."""
    if SILU:
        sigmoid = tl.sigmoid(z)
        dy = dy * sigmoid * (1.0 + z * (1.0 - sigmoid))
    return dy
