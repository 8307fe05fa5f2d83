# mypy: allow-untyped-defs
"""Cross-attention in Triton: many queries, a few hundred keys at most.

All keys of a prompt pass through one program, so nothing but q has to be kept: the dQ kernel finds the log-sum-exp and
delta of its queries again and hands them to the dK/dV kernel. That one cuts the queries into splits (a grid over keys
alone would fill 16 multiprocessors of a guided pair) and writes float32 partial sums, which a third kernel adds up in
a fixed order: no atomics, bit-equal runs. A block of keys is two powers of two, 77 as 64 + 16, taken one after the
other by the online softmax.
"""

import triton
import triton.language as tl

from fastcraft_kernels.attention.kernel import LOG2E, load_tile, multiply, store_tile


@triton.jit
def load_pair(
    source, n, row, head, stride_n, stride_s, num_rows, H_STRIDE: tl.constexpr, ROWS: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr, FULL: tl.constexpr, DOT_F32: tl.constexpr,
):  # fmt: skip
    """Head and tail of some rows; the head twice where there is no tail."""
    a = load_tile(source, n, row, head, stride_n, stride_s, num_rows, H_STRIDE, ROWS, 0, HEAD, D, FULL, False, DOT_F32)
    if TAIL > 0:
        b = load_tile(
            source, n, row, head, stride_n, stride_s, num_rows, H_STRIDE, ROWS, HEAD, TAIL, D, FULL, False, DOT_F32
        )
    else:
        b = a
    return a, b


@triton.jit
def row_of_text(n, num_shared):
    """The row of keys that sample ``n`` reads: row 0 for the first ``num_shared`` samples."""
    return tl.maximum(n - num_shared + 1, 0)


@triton.jit
def product(x_a, x_b, y_a, y_b, TAIL: tl.constexpr):
    """``x @ y^T``, summed over head and tail."""
    s = multiply(x_a, tl.trans(y_a), tl.zeros([x_a.shape[0], y_a.shape[0]], tl.float32))
    if TAIL > 0:
        s = multiply(x_b, tl.trans(y_b), s)
    return s


@triton.jit
def masked(s, row, num_keys, KEYS: tl.constexpr, FULL: tl.constexpr):
    """Scores (queries, keys) with minus infinity where there is no key."""
    if not FULL:
        s = tl.where((row + tl.arange(0, KEYS) < num_keys)[None, :], s, float("-inf"))
    return s


@triton.jit
def forward_step(
    q_a, q_b, acc_a, acc_b, top, total, k, v, n, row, head, stride_n, stride_l, L, to_log2,
    H_STRIDE: tl.constexpr, KEYS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, TAIL_OUT: tl.constexpr,
    D: tl.constexpr, FULL: tl.constexpr, DOT_F32: tl.constexpr,
):  # fmt: skip
    """The online softmax over ``KEYS`` more keys."""
    k_a, k_b = load_pair(k, n, row, head, stride_n, stride_l, L, H_STRIDE, KEYS, HEAD, TAIL, D, FULL, DOT_F32)
    v_a, v_b = load_pair(
        v, n, row, head, stride_n, stride_l, L, H_STRIDE, KEYS, HEAD, TAIL_OUT if TAIL > 0 else 0, D, FULL, DOT_F32
    )
    s = masked(product(q_a, q_b, k_a, k_b, TAIL), row, L, KEYS, FULL) * to_log2
    new_top = tl.maximum(top, tl.max(s, 1))
    shrink = tl.exp2(top - new_top)
    p = tl.exp2(s - new_top[:, None])
    weights = p.to(v_a.dtype)
    acc_a = multiply(weights, v_a, acc_a * shrink[:, None])
    if TAIL > 0:
        acc_b = multiply(weights, v_b, acc_b * shrink[:, None])
    return acc_a, acc_b, new_top, total * shrink + tl.sum(p, 1)


@triton.jit(do_not_specialize=["num_shared"])
def cross_forward_kernel(
    q, k, v, out, q_stride_n, q_stride_s, stride_n, stride_l, num_shared, S, L, scale,
    Q_STRIDE_H: tl.constexpr, H_STRIDE: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, TAIL_OUT: tl.constexpr, ROWS: tl.constexpr, EVEN_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    FIRST_FULL: tl.constexpr, REST_FULL: tl.constexpr, DOT_F32: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS
    head = tl.program_id(1)
    n = tl.program_id(2)
    m = row_of_text(n, num_shared)
    q_a, q_b = load_pair(
        q, n, row, head, q_stride_n, q_stride_s, S, Q_STRIDE_H, ROWS, HEAD, TAIL, D, EVEN_ROWS, DOT_F32
    )
    acc_a = tl.zeros([ROWS, HEAD], tl.float32)
    acc_b = tl.zeros([ROWS, TAIL_OUT], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    to_log2 = scale * LOG2E
    for block in range(BLOCKS):
        first = block * (FIRST + REST)
        acc_a, acc_b, top, total = forward_step(
            q_a, q_b, acc_a, acc_b, top, total, k, v, m, first, head, stride_n, stride_l, L, to_log2,
            H_STRIDE, FIRST, HEAD, TAIL, TAIL_OUT, D, FIRST_FULL, DOT_F32,
        )  # fmt: skip
        if REST > 0:
            acc_a, acc_b, top, total = forward_step(
                q_a, q_b, acc_a, acc_b, top, total, k, v, m, first + FIRST, head, stride_n, stride_l, L, to_log2,
                H_STRIDE, REST, HEAD, TAIL, TAIL_OUT, D, REST_FULL, DOT_F32,
            )  # fmt: skip
    inverse = 1.0 / total
    store_tile(out, acc_a * inverse[:, None], n, row, head, S, H, ROWS, 0, HEAD, D, EVEN_ROWS)
    if TAIL > 0:
        store_tile(out, acc_b * inverse[:, None], n, row, head, S, H, ROWS, HEAD, TAIL_OUT, D, EVEN_ROWS)


@triton.jit
def scores_and_slopes(
    q_a, q_b, do_a, do_b, k, v, n, row, head, stride_n, stride_l, L, to_log2,
    H_STRIDE: tl.constexpr, KEYS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr,
    FULL: tl.constexpr, DOT_F32: tl.constexpr,
):  # fmt: skip
    """Scores in base 2 and dP = dOut V^T, (queries, ``KEYS``) each."""
    k_a, k_b = load_pair(k, n, row, head, stride_n, stride_l, L, H_STRIDE, KEYS, HEAD, TAIL, D, FULL, DOT_F32)
    v_a, v_b = load_pair(v, n, row, head, stride_n, stride_l, L, H_STRIDE, KEYS, HEAD, TAIL, D, FULL, DOT_F32)
    s = masked(product(q_a, q_b, k_a, k_b, TAIL), row, L, KEYS, FULL) * to_log2
    return s, product(do_a, do_b, v_a, v_b, TAIL)


@triton.jit
def statistics_step(s, dp, top, total, slope):
    """Running maximum, sum of exp, and sum of exp * dP over more keys."""
    new_top = tl.maximum(top, tl.max(s, 1))
    shrink = tl.exp2(top - new_top)
    p = tl.exp2(s - new_top[:, None])
    return new_top, total * shrink + tl.sum(p, 1), slope * shrink + tl.sum(p * dp, 1)


@triton.jit
def dq_step(
    s, dp, lse, delta, acc_a, acc_b, k, n, row, head, stride_n, stride_l, L,
    H_STRIDE: tl.constexpr, KEYS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, TAIL_OUT: tl.constexpr,
    D: tl.constexpr, FULL: tl.constexpr, DOT_F32: tl.constexpr,
):  # fmt: skip
    """dQ += dS K over ``KEYS`` keys; a missing key has s = -inf, hence no share."""
    k_a, k_b = load_pair(
        k, n, row, head, stride_n, stride_l, L, H_STRIDE, KEYS, HEAD, TAIL_OUT if TAIL > 0 else 0, D, FULL, DOT_F32
    )
    ds = (tl.exp2(s - lse[:, None]) * (dp - delta[:, None])).to(k_a.dtype)
    acc_a = multiply(ds, k_a, acc_a)
    if TAIL > 0:
        acc_b = multiply(ds, k_b, acc_b)
    return acc_a, acc_b


@triton.jit(do_not_specialize=["num_shared"])
def cross_dq_kernel(
    q, k, v, dout, dq, lse_out, delta_out, q_stride_n, q_stride_s, stride_n, stride_l, num_shared, S, L, scale,
    Q_STRIDE_H: tl.constexpr, H_STRIDE: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, TAIL_OUT: tl.constexpr, ROWS: tl.constexpr, EVEN_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    FIRST_FULL: tl.constexpr, REST_FULL: tl.constexpr, DOT_F32: tl.constexpr,
):  # fmt: skip
    """dQ, and of each query the log-sum-exp (base 2) and delta = sum_j P_ij dP_ij, both of which need no output.

    With one block of keys the second pass repeats nothing: its products are those of the first, and compile to them.
    """
    row = tl.program_id(0) * ROWS
    head = tl.program_id(1)
    n = tl.program_id(2)
    m = row_of_text(n, num_shared)
    q_a, q_b = load_pair(
        q, n, row, head, q_stride_n, q_stride_s, S, Q_STRIDE_H, ROWS, HEAD, TAIL, D, EVEN_ROWS, DOT_F32
    )
    do_a, do_b = load_pair(dout, n, row, head, S * H * D, H * D, S, D, ROWS, HEAD, TAIL, D, EVEN_ROWS, DOT_F32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    slope = tl.zeros([ROWS], tl.float32)
    to_log2 = scale * LOG2E
    for block in range(BLOCKS):
        first = block * (FIRST + REST)
        s, dp = scores_and_slopes(
            q_a, q_b, do_a, do_b, k, v, m, first, head, stride_n, stride_l, L, to_log2,
            H_STRIDE, FIRST, HEAD, TAIL, D, FIRST_FULL, DOT_F32,
        )  # fmt: skip
        top, total, slope = statistics_step(s, dp, top, total, slope)
        if REST > 0:
            s, dp = scores_and_slopes(
                q_a, q_b, do_a, do_b, k, v, m, first + FIRST, head, stride_n, stride_l, L, to_log2,
                H_STRIDE, REST, HEAD, TAIL, D, REST_FULL, DOT_F32,
            )  # fmt: skip
            top, total, slope = statistics_step(s, dp, top, total, slope)
    lse = top + tl.log2(total)
    delta = slope / total
    acc_a = tl.zeros([ROWS, HEAD], tl.float32)
    acc_b = tl.zeros([ROWS, TAIL_OUT], tl.float32)
    for block in range(BLOCKS):
        first = block * (FIRST + REST)
        s, dp = scores_and_slopes(
            q_a, q_b, do_a, do_b, k, v, m, first, head, stride_n, stride_l, L, to_log2,
            H_STRIDE, FIRST, HEAD, TAIL, D, FIRST_FULL, DOT_F32,
        )  # fmt: skip
        acc_a, acc_b = dq_step(
            s, dp, lse, delta, acc_a, acc_b, k, m, first, head, stride_n, stride_l, L,
            H_STRIDE, FIRST, HEAD, TAIL, TAIL_OUT, D, FIRST_FULL, DOT_F32,
        )  # fmt: skip
        if REST > 0:
            s, dp = scores_and_slopes(
                q_a, q_b, do_a, do_b, k, v, m, first + FIRST, head, stride_n, stride_l, L, to_log2,
                H_STRIDE, REST, HEAD, TAIL, D, REST_FULL, DOT_F32,
            )  # fmt: skip
            acc_a, acc_b = dq_step(
                s, dp, lse, delta, acc_a, acc_b, k, m, first + FIRST, head, stride_n, stride_l, L,
                H_STRIDE, REST, HEAD, TAIL, TAIL_OUT, D, REST_FULL, DOT_F32,
            )  # fmt: skip
    store_tile(dq, acc_a * scale, n, row, head, S, H, ROWS, 0, HEAD, D, EVEN_ROWS)
    if TAIL > 0:
        store_tile(dq, acc_b * scale, n, row, head, S, H, ROWS, HEAD, TAIL_OUT, D, EVEN_ROWS)
    rows = row + tl.arange(0, ROWS)
    stats = (n.to(tl.int64) * H + head) * S + rows
    tl.store(lse_out + stats, lse, mask=rows < S)
    tl.store(delta_out + stats, delta, mask=rows < S)


@triton.jit
def dkdv_step(
    k_a, k_b, v_a, v_b, q_a, q_b, do_a, do_b, q_out, do_out, lse, delta, dk_a, dk_b, dv_a, dv_b, to_log2,
    TAIL: tl.constexpr,
):  # fmt: skip
    """dK and dV of one piece of the keys over more queries, from transposed scores (keys, queries)."""
    p = tl.exp2(product(k_a, k_b, q_a, q_b, TAIL) * to_log2 - lse[None, :])
    weights = p.to(q_a.dtype)
    ds = (p * (product(v_a, v_b, do_a, do_b, TAIL) - delta[None, :])).to(q_a.dtype)
    dv_a = multiply(weights, do_a, dv_a)
    dk_a = multiply(ds, q_a, dk_a)
    if TAIL > 0:
        dv_b = multiply(weights, do_out, dv_b)
        dk_b = multiply(ds, q_out, dk_b)
    return dk_a, dk_b, dv_a, dv_b


@triton.jit
def store_sums(
    dk, dv, dk_a, dk_b, dv_a, dv_b, scale, n, row, head, L, H: tl.constexpr, KEYS: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, TAIL_OUT: tl.constexpr, D: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    store_tile(dk, dk_a * scale, n, row, head, L, H, KEYS, 0, HEAD, D, FULL)
    store_tile(dv, dv_a, n, row, head, L, H, KEYS, 0, HEAD, D, FULL)
    if TAIL > 0:
        store_tile(dk, dk_b * scale, n, row, head, L, H, KEYS, HEAD, TAIL_OUT, D, FULL)
        store_tile(dv, dv_b, n, row, head, L, H, KEYS, HEAD, TAIL_OUT, D, FULL)


@triton.jit(do_not_specialize=["num_shared"])
def cross_dkdv_kernel(
    q, k, v, dout, lse_in, delta_in, dk, dv, q_stride_n, q_stride_s, stride_n, stride_l, num_shared, N, S, L, scale,
    split_rows,
    Q_STRIDE_H: tl.constexpr, H_STRIDE: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, TAIL_OUT: tl.constexpr, ROWS: tl.constexpr, EVEN_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    FIRST_FULL: tl.constexpr, REST_FULL: tl.constexpr, DOT_F32: tl.constexpr,
):  # fmt: skip
    """Partial dK and dV (splits * N, L, H, D) float32 of one block of keys from one split of the queries.

    Missing queries are zero in q, dout, lse and delta; missing keys are not stored.
    """
    split = tl.program_id(0) // BLOCKS
    first = tl.program_id(0) % BLOCKS * (FIRST + REST)
    head = tl.program_id(1)
    n = tl.program_id(2)
    m = row_of_text(n, num_shared)
    k_a, k_b = load_pair(k, m, first, head, stride_n, stride_l, L, H_STRIDE, FIRST, HEAD, TAIL, D, FIRST_FULL, DOT_F32)
    v_a, v_b = load_pair(v, m, first, head, stride_n, stride_l, L, H_STRIDE, FIRST, HEAD, TAIL, D, FIRST_FULL, DOT_F32)
    dk_a = tl.zeros([FIRST, HEAD], tl.float32)
    dv_a = tl.zeros([FIRST, HEAD], tl.float32)
    dk_b = tl.zeros([FIRST, TAIL_OUT], tl.float32)
    dv_b = tl.zeros([FIRST, TAIL_OUT], tl.float32)
    rest = first + FIRST
    if REST > 0:
        k_c, k_d = load_pair(k, m, rest, head, stride_n, stride_l, L, H_STRIDE, REST, HEAD, TAIL, D, REST_FULL, DOT_F32)
        v_c, v_d = load_pair(v, m, rest, head, stride_n, stride_l, L, H_STRIDE, REST, HEAD, TAIL, D, REST_FULL, DOT_F32)
        dk_c = tl.zeros([REST, HEAD], tl.float32)
        dv_c = tl.zeros([REST, HEAD], tl.float32)
        dk_d = tl.zeros([REST, TAIL_OUT], tl.float32)
        dv_d = tl.zeros([REST, TAIL_OUT], tl.float32)
    to_log2 = scale * LOG2E
    stats = (n.to(tl.int64) * H + head) * S
    for row in range(split * split_rows, tl.minimum((split + 1) * split_rows, S), ROWS):
        rows = row + tl.arange(0, ROWS)
        q_a, q_b = load_pair(
            q, n, row, head, q_stride_n, q_stride_s, S, Q_STRIDE_H, ROWS, HEAD, TAIL, D, EVEN_ROWS, DOT_F32
        )
        do_a, do_b = load_pair(dout, n, row, head, S * H * D, H * D, S, D, ROWS, HEAD, TAIL, D, EVEN_ROWS, DOT_F32)
        q_out, do_out = q_b, do_b
        if TAIL_OUT < TAIL:
            q_out = load_tile(
                q, n, row, head, q_stride_n, q_stride_s, S,
                Q_STRIDE_H, ROWS, HEAD, TAIL_OUT, D, EVEN_ROWS, False, DOT_F32,
            )  # fmt: skip
            do_out = load_tile(
                dout, n, row, head, S * H * D, H * D, S, D, ROWS, HEAD, TAIL_OUT, D, EVEN_ROWS, False, DOT_F32
            )
        lse = tl.load(lse_in + stats + rows, mask=rows < S, other=0.0)
        delta = tl.load(delta_in + stats + rows, mask=rows < S, other=0.0)
        dk_a, dk_b, dv_a, dv_b = dkdv_step(
            k_a, k_b, v_a, v_b, q_a, q_b, do_a, do_b, q_out, do_out, lse, delta, dk_a, dk_b, dv_a, dv_b, to_log2, TAIL
        )
        if REST > 0:
            dk_c, dk_d, dv_c, dv_d = dkdv_step(
                k_c, k_d, v_c, v_d, q_a, q_b, do_a, do_b, q_out, do_out, lse, delta, dk_c, dk_d, dv_c, dv_d, to_log2,
                TAIL,
            )  # fmt: skip
    part = split * N + n
    store_sums(
        dk, dv, dk_a, dk_b, dv_a, dv_b, scale, part, first, head, L, H, FIRST, HEAD, TAIL, TAIL_OUT, D, FIRST_FULL
    )
    if REST > 0:
        store_sums(
            dk, dv, dk_c, dk_d, dv_c, dv_d, scale, part, rest, head, L, H, REST, HEAD, TAIL, TAIL_OUT, D, REST_FULL
        )


@triton.jit(do_not_specialize=["num_shared"])
def cross_sum_kernel(
    dk_parts, dv_parts, dk, dv, size, splits, N, num_shared, BLOCK: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    """Partial sums (splits * N, ``size``) of the samples that read row r, into that row; ``ADD``: to what is there."""
    r = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < size
    k_sum = tl.zeros([BLOCK], tl.float32)
    v_sum = tl.zeros([BLOCK], tl.float32)
    for n in range(tl.where(r == 0, 0, r + num_shared - 1), r + num_shared):
        for split in range(splits):
            at = (split * N + n).to(tl.int64) * size + cols
            k_sum += tl.load(dk_parts + at, mask=mask, other=0.0)
            v_sum += tl.load(dv_parts + at, mask=mask, other=0.0)
    to = r.to(tl.int64) * size + cols
    if ADD:
        k_sum += tl.load(dk + to, mask=mask, other=0.0)
        v_sum += tl.load(dv + to, mask=mask, other=0.0)
    tl.store(dk + to, k_sum.to(dk.dtype.element_ty), mask=mask)
    tl.store(dv + to, v_sum.to(dv.dtype.element_ty), mask=mask)
