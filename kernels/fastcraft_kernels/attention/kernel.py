# mypy: allow-untyped-defs
"""Self-attention in Triton: forward, dQ and dK/dV, over head widths cut into two powers of two.

One source serves pointers (sm80: ``cp.async``) and host tensor descriptors (sm90: TMA); `load_tile` is where they
part. Two rules are behind the shape of this file: the head stride is a compile-time constant, because Triton tests
run-time integers for divisibility by 16 only and a stride of 40 would cost every 16-byte load; and nothing is added
atomically, so that two runs are bit-equal. That costs two products more than the five a fused backward needs.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(
    source, n, row, head, stride_n, stride_s, num_rows,
    H_STRIDE: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    EVEN: tl.constexpr, DESCRIPTOR: tl.constexpr, DOT_F32: tl.constexpr,
):  # fmt: skip
    """Rows ``row ...`` and columns ``FIRST ...`` of one head: (ROWS, WIDTH), zero beyond the last row and column D."""
    if DESCRIPTOR:
        x = source.load([n, row, head, FIRST]).reshape([ROWS, WIDTH])
    else:
        rows = tl.arange(0, ROWS)
        cols = FIRST + tl.arange(0, WIDTH)
        base = source + n.to(tl.int64) * stride_n + head * H_STRIDE + row * stride_s
        pointers = base + (rows[:, None] * stride_s + cols[None, :])
        if EVEN and FIRST + WIDTH <= D:
            x = tl.load(pointers)
        elif EVEN:
            x = tl.load(pointers, mask=(cols < D)[None, :], other=0.0)
        elif FIRST + WIDTH <= D:
            x = tl.load(pointers, mask=(row + rows < num_rows)[:, None], other=0.0)
        else:
            x = tl.load(pointers, mask=(row + rows < num_rows)[:, None] & (cols < D)[None, :], other=0.0)
    return x.to(tl.float32) if DOT_F32 else x


@triton.jit
def store_tile(
    target, x, n, row, head, num_rows,
    H: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """`load_tile`'s inverse, to a contiguous (N, S, H, D) tensor; nothing is written beyond the last row and column."""
    rows = tl.arange(0, ROWS)
    cols = FIRST + tl.arange(0, WIDTH)
    base = target + (n.to(tl.int64) * num_rows + row) * (H * D) + head * D
    pointers = base + (rows[:, None] * (H * D) + cols[None, :])
    x = x.to(target.dtype.element_ty)
    if EVEN and FIRST + WIDTH <= D:
        tl.store(pointers, x)
    else:
        tl.store(pointers, x, mask=(row + rows < num_rows)[:, None] & (cols < D)[None, :])


@triton.jit
def multiply(a, b, acc):
    """``a @ b + acc``, in full precision where the operands are float32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def attention_forward_kernel(
    q, q_tail, k, k_tail, v, v_tail, out, lse, stride_n, stride_s, S, scale,
    H_STRIDE: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, TAIL_OUT: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, EVEN_ROWS: tl.constexpr, EVEN_STEPS: tl.constexpr,
    DESCRIPTOR: tl.constexpr, DOT_F32: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS
    head = tl.program_id(1)
    n = tl.program_id(2)
    rows = row + tl.arange(0, ROWS)
    q_a = load_tile(q, n, row, head, stride_n, stride_s, S, H_STRIDE, ROWS, 0, HEAD, D, EVEN_ROWS, DESCRIPTOR, DOT_F32)
    acc_a = tl.zeros([ROWS, HEAD], tl.float32)
    if TAIL > 0:
        q_b = load_tile(
            q_tail, n, row, head, stride_n, stride_s, S, H_STRIDE, ROWS, HEAD, TAIL, D, EVEN_ROWS, DESCRIPTOR, DOT_F32
        )
        acc_b = tl.zeros([ROWS, TAIL_OUT], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    to_log2 = scale * LOG2E
    for step in range(0, S, STEPS):
        k_a = load_tile(
            k, n, step, head, stride_n, stride_s, S, H_STRIDE, STEPS, 0, HEAD, D, EVEN_STEPS, DESCRIPTOR, DOT_F32
        )
        s = multiply(q_a, tl.trans(k_a), tl.zeros([ROWS, STEPS], tl.float32))
        if TAIL > 0:
            k_b = load_tile(
                k_tail, n, step, head, stride_n, stride_s, S,
                H_STRIDE, STEPS, HEAD, TAIL, D, EVEN_STEPS, DESCRIPTOR, DOT_F32,
            )  # fmt: skip
            s = multiply(q_b, tl.trans(k_b), s)
        if not EVEN_STEPS:
            s = tl.where((step + tl.arange(0, STEPS) < S)[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1) * to_log2)
        p = tl.exp2(s * to_log2 - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        top = new_top
        v_a = load_tile(
            v, n, step, head, stride_n, stride_s, S, H_STRIDE, STEPS, 0, HEAD, D, EVEN_STEPS, DESCRIPTOR, DOT_F32
        )
        weights = p.to(v_a.dtype)
        acc_a = multiply(weights, v_a, acc_a * shrink[:, None])
        if TAIL > 0:
            v_b = load_tile(
                v_tail, n, step, head, stride_n, stride_s, S,
                H_STRIDE, STEPS, HEAD, TAIL_OUT, D, EVEN_STEPS, DESCRIPTOR, DOT_F32,
            )  # fmt: skip
            acc_b = multiply(weights, v_b, acc_b * shrink[:, None])
    inverse = 1.0 / total
    store_tile(out, acc_a * inverse[:, None], n, row, head, S, H, ROWS, 0, HEAD, D, EVEN_ROWS)
    if TAIL > 0:
        store_tile(out, acc_b * inverse[:, None], n, row, head, S, H, ROWS, HEAD, TAIL_OUT, D, EVEN_ROWS)
    lse_at = lse + (n.to(tl.int64) * H + head) * S
    tl.store(lse_at + rows, (top + tl.log2(total)) * LN2, mask=rows < S)


@triton.jit
def attention_dq_kernel(
    q, q_tail, k, k_tail, k_tail_out, v, v_tail, dout, dout_tail, out, lse, delta, dq,
    stride_n, stride_s, out_stride_n, out_stride_s, S, scale,
    H_STRIDE: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, TAIL_OUT: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, EVEN_ROWS: tl.constexpr, EVEN_STEPS: tl.constexpr,
    DESCRIPTOR: tl.constexpr, DOT_F32: tl.constexpr,
):  # fmt: skip
    """dQ of some queries, and delta = rowsum(dOut * Out), which the dK/dV kernel reads."""
    row = tl.program_id(0) * ROWS
    head = tl.program_id(1)
    n = tl.program_id(2)
    rows = row + tl.arange(0, ROWS)
    q_a = load_tile(q, n, row, head, stride_n, stride_s, S, H_STRIDE, ROWS, 0, HEAD, D, EVEN_ROWS, DESCRIPTOR, DOT_F32)
    do_a = load_tile(
        dout, n, row, head, out_stride_n, out_stride_s, S, D, ROWS, 0, HEAD, D, EVEN_ROWS, DESCRIPTOR, DOT_F32
    )
    out_a = load_tile(out, n, row, head, out_stride_n, out_stride_s, S, D, ROWS, 0, HEAD, D, EVEN_ROWS, False, True)
    row_delta = tl.sum(do_a.to(tl.float32) * out_a, 1)
    acc_a = tl.zeros([ROWS, HEAD], tl.float32)
    if TAIL > 0:
        q_b = load_tile(
            q_tail, n, row, head, stride_n, stride_s, S, H_STRIDE, ROWS, HEAD, TAIL, D, EVEN_ROWS, DESCRIPTOR, DOT_F32
        )
        do_b = load_tile(
            dout_tail, n, row, head, out_stride_n, out_stride_s, S,
            D, ROWS, HEAD, TAIL, D, EVEN_ROWS, DESCRIPTOR, DOT_F32,
        )  # fmt: skip
        out_b = load_tile(
            out, n, row, head, out_stride_n, out_stride_s, S, D, ROWS, HEAD, TAIL, D, EVEN_ROWS, False, True
        )
        row_delta += tl.sum(do_b.to(tl.float32) * out_b, 1)
        acc_b = tl.zeros([ROWS, TAIL_OUT], tl.float32)
    stats = (n.to(tl.int64) * H + head) * S + rows
    tl.store(delta + stats, row_delta, mask=rows < S)
    row_lse = tl.load(lse + stats, mask=rows < S, other=0.0) * LOG2E
    to_log2 = scale * LOG2E
    for step in range(0, S, STEPS):
        k_a = load_tile(
            k, n, step, head, stride_n, stride_s, S, H_STRIDE, STEPS, 0, HEAD, D, EVEN_STEPS, DESCRIPTOR, DOT_F32
        )
        v_a = load_tile(
            v, n, step, head, stride_n, stride_s, S, H_STRIDE, STEPS, 0, HEAD, D, EVEN_STEPS, DESCRIPTOR, DOT_F32
        )
        s = multiply(q_a, tl.trans(k_a), tl.zeros([ROWS, STEPS], tl.float32))
        dp = multiply(do_a, tl.trans(v_a), tl.zeros([ROWS, STEPS], tl.float32))
        if TAIL > 0:
            k_b = load_tile(
                k_tail, n, step, head, stride_n, stride_s, S,
                H_STRIDE, STEPS, HEAD, TAIL, D, EVEN_STEPS, DESCRIPTOR, DOT_F32,
            )  # fmt: skip
            v_b = load_tile(
                v_tail, n, step, head, stride_n, stride_s, S,
                H_STRIDE, STEPS, HEAD, TAIL, D, EVEN_STEPS, DESCRIPTOR, DOT_F32,
            )  # fmt: skip
            s = multiply(q_b, tl.trans(k_b), s)
            dp = multiply(do_b, tl.trans(v_b), dp)
        p = tl.exp2(s * to_log2 - row_lse[:, None])
        if not EVEN_STEPS:  # a key that does not exist has score 0, and exp2(-lse) may overflow
            p = tl.where((step + tl.arange(0, STEPS) < S)[None, :], p, 0.0)
        ds = (p * (dp - row_delta[:, None])).to(k_a.dtype)
        acc_a = multiply(ds, k_a, acc_a)
        if TAIL > 0:
            if TAIL_OUT < TAIL:
                k_b = load_tile(
                    k_tail_out, n, step, head, stride_n, stride_s, S,
                    H_STRIDE, STEPS, HEAD, TAIL_OUT, D, EVEN_STEPS, DESCRIPTOR, DOT_F32,
                )  # fmt: skip
            acc_b = multiply(ds, k_b, acc_b)
    store_tile(dq, acc_a * scale, n, row, head, S, H, ROWS, 0, HEAD, D, EVEN_ROWS)
    if TAIL > 0:
        store_tile(dq, acc_b * scale, n, row, head, S, H, ROWS, HEAD, TAIL_OUT, D, EVEN_ROWS)


@triton.jit
def attention_dkdv_kernel(
    q, q_tail, q_tail_out, k, k_tail, v, v_tail, dout, dout_tail, dout_tail_out, lse, delta, dk, dv,
    stride_n, stride_s, out_stride_n, out_stride_s, S, scale,
    H_STRIDE: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, TAIL_OUT: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, EVEN_ROWS: tl.constexpr, EVEN_STEPS: tl.constexpr,
    DESCRIPTOR: tl.constexpr, DOT_F32: tl.constexpr,
):  # fmt: skip
    """dK and dV of some keys, from transposed scores (keys, queries).

    Rows beyond S need no mask: missing queries are zero in q, dout, lse and delta, missing keys are not stored.
    """
    row = tl.program_id(0) * ROWS
    head = tl.program_id(1)
    n = tl.program_id(2)
    k_a = load_tile(k, n, row, head, stride_n, stride_s, S, H_STRIDE, ROWS, 0, HEAD, D, EVEN_ROWS, DESCRIPTOR, DOT_F32)
    v_a = load_tile(v, n, row, head, stride_n, stride_s, S, H_STRIDE, ROWS, 0, HEAD, D, EVEN_ROWS, DESCRIPTOR, DOT_F32)
    dk_a = tl.zeros([ROWS, HEAD], tl.float32)
    dv_a = tl.zeros([ROWS, HEAD], tl.float32)
    if TAIL > 0:
        k_b = load_tile(
            k_tail, n, row, head, stride_n, stride_s, S, H_STRIDE, ROWS, HEAD, TAIL, D, EVEN_ROWS, DESCRIPTOR, DOT_F32
        )
        v_b = load_tile(
            v_tail, n, row, head, stride_n, stride_s, S, H_STRIDE, ROWS, HEAD, TAIL, D, EVEN_ROWS, DESCRIPTOR, DOT_F32
        )
        dk_b = tl.zeros([ROWS, TAIL_OUT], tl.float32)
        dv_b = tl.zeros([ROWS, TAIL_OUT], tl.float32)
    stats = (n.to(tl.int64) * H + head) * S
    to_log2 = scale * LOG2E
    for step in range(0, S, STEPS):
        steps = step + tl.arange(0, STEPS)
        q_a = load_tile(
            q, n, step, head, stride_n, stride_s, S, H_STRIDE, STEPS, 0, HEAD, D, EVEN_STEPS, DESCRIPTOR, DOT_F32
        )
        do_a = load_tile(
            dout, n, step, head, out_stride_n, out_stride_s, S, D, STEPS, 0, HEAD, D, EVEN_STEPS, DESCRIPTOR, DOT_F32
        )
        s = multiply(k_a, tl.trans(q_a), tl.zeros([ROWS, STEPS], tl.float32))
        dp = multiply(v_a, tl.trans(do_a), tl.zeros([ROWS, STEPS], tl.float32))
        if TAIL > 0:
            q_b = load_tile(
                q_tail, n, step, head, stride_n, stride_s, S,
                H_STRIDE, STEPS, HEAD, TAIL, D, EVEN_STEPS, DESCRIPTOR, DOT_F32,
            )  # fmt: skip
            do_b = load_tile(
                dout_tail, n, step, head, out_stride_n, out_stride_s, S,
                D, STEPS, HEAD, TAIL, D, EVEN_STEPS, DESCRIPTOR, DOT_F32,
            )  # fmt: skip
            s = multiply(k_b, tl.trans(q_b), s)
            dp = multiply(v_b, tl.trans(do_b), dp)
        row_lse = tl.load(lse + stats + steps, mask=steps < S, other=0.0) * LOG2E
        row_delta = tl.load(delta + stats + steps, mask=steps < S, other=0.0)
        p = tl.exp2(s * to_log2 - row_lse[None, :])
        weights = p.to(q_a.dtype)
        ds = (p * (dp - row_delta[None, :])).to(q_a.dtype)
        dv_a = multiply(weights, do_a, dv_a)
        dk_a = multiply(ds, q_a, dk_a)
        if TAIL > 0:
            if TAIL_OUT < TAIL:
                q_b = load_tile(
                    q_tail_out, n, step, head, stride_n, stride_s, S,
                    H_STRIDE, STEPS, HEAD, TAIL_OUT, D, EVEN_STEPS, DESCRIPTOR, DOT_F32,
                )  # fmt: skip
                do_b = load_tile(
                    dout_tail_out, n, step, head, out_stride_n, out_stride_s, S,
                    D, STEPS, HEAD, TAIL_OUT, D, EVEN_STEPS, DESCRIPTOR, DOT_F32,
                )  # fmt: skip
            dv_b = multiply(weights, do_b, dv_b)
            dk_b = multiply(ds, q_b, dk_b)
    store_tile(dk, dk_a * scale, n, row, head, S, H, ROWS, 0, HEAD, D, EVEN_ROWS)
    store_tile(dv, dv_a, n, row, head, S, H, ROWS, 0, HEAD, D, EVEN_ROWS)
    if TAIL > 0:
        store_tile(dk, dk_b * scale, n, row, head, S, H, ROWS, HEAD, TAIL_OUT, D, EVEN_ROWS)
        store_tile(dv, dv_b, n, row, head, S, H, ROWS, HEAD, TAIL_OUT, D, EVEN_ROWS)


def has_narrow_group_products() -> bool:
    """Whether this Triton makes sm90 warp-group products of 8 columns; before 3.8 they fall back to ``mma.sync``."""
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 8)


def descriptor(x: Tensor, block: list[int]) -> Any:
    """A host tensor descriptor (TMA) of ``x`` that loads ``block``."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)
