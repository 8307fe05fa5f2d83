"""Starts the self-attention kernels: layouts, tiles, tensor descriptors, outputs."""

from typing import Any

import torch
from torch import Tensor

from fastcraft_kernels.attention.kernel import (
    attention_dkdv_kernel,
    attention_dq_kernel,
    attention_forward_kernel,
    descriptor,
    has_narrow_group_products,
)
from fastcraft_kernels.attention.tiles import HEAD_SPLITS, HeadSplit, Tile, tile_for
from fastcraft_kernels.launch import ceil_div, device_facts, device_guard, dot_in_float32


def result_tail(split: HeadSplit, arch: int) -> int:
    """Width of a tail as a result."""
    return split.tail if arch >= 90 and not has_narrow_group_products() else split.tail_out


def is_aligned(x: Tensor) -> bool:
    """Whether 16-byte loads, and tensor descriptors, reach every row of every head (a zero stride is not for those)."""
    step = 16 // x.element_size()
    whole = all(s > 0 and s % step == 0 for s in x.stride()[:-1])
    return whole and x.stride(-1) == 1 and x.data_ptr() % 16 == 0


def alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors as they are if their strides are equal and aligned (slices of one product are), else copies."""
    if len({x.stride() for x in tensors}) == 1 and all(is_aligned(x) for x in tensors):
        return tensors
    return tuple(x.contiguous() for x in tensors)


def _sources(x: Tensor, rows: int, split: HeadSplit, tail_out: int, tile: Tile) -> tuple[Any, Any, Any]:
    """What `load_tile` reads ``x`` through: its head, its tail, and its tail at the width of a result (if another)."""
    head, tail, narrow = split.head, split.tail, tail_out if tail_out < split.tail else 0
    if not tile.descriptor:
        return x, x if tail else None, x if narrow else None
    blocks = [descriptor(x, [1, rows, 1, width]) if width else None for width in (head, tail, narrow)]
    return blocks[0], blocks[1], blocks[2]


def _constants(x: Tensor, tile: Tile, split: HeadSplit, tail_out: int) -> dict[str, Any]:
    seq, heads, head_dim = x.shape[1:]
    return {
        "H_STRIDE": x.stride(2), "H": heads, "D": head_dim,
        "HEAD": split.head, "TAIL": split.tail, "TAIL_OUT": tail_out,
        "ROWS": tile.rows, "STEPS": tile.steps, "EVEN_ROWS": seq % tile.rows == 0, "EVEN_STEPS": seq % tile.steps == 0,
        "DESCRIPTOR": tile.descriptor, "DOT_F32": dot_in_float32(),
        "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """Output (N, S, H, D) and natural-log log-sum-exp (N, H, S) float32; ``tile`` overrides the table."""
    q, k, v = alike(q, k, v)
    n, seq, heads, head_dim = q.shape
    arch, split = device_facts(q.device).arch, HEAD_SPLITS[head_dim]
    tile = tile or tile_for("forward", arch=arch, head_dim=head_dim, dtype=q.dtype)
    tail_out = result_tail(split, arch)
    out, lse = q.new_empty(q.shape), q.new_empty((n, heads, seq), dtype=torch.float32)
    q_head, q_tail, _ = _sources(q, tile.rows, split, tail_out, tile)
    k_head, k_tail, _ = _sources(k, tile.steps, split, tail_out, tile)
    v_head, v_tail, v_narrow = _sources(v, tile.steps, split, tail_out, tile)
    with device_guard(q):
        attention_forward_kernel[(ceil_div(seq, tile.rows), heads, n)](
            q_head, q_tail, k_head, k_tail, v_head, v_tail if v_narrow is None else v_narrow, out, lse,
            q.stride(0), q.stride(1), seq, scale, **_constants(q, tile, split, tail_out),
        )  # fmt: skip
    return out, lse


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float,
    dq_tile: Tile | None = None, dkdv_tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dQ, dK, dV, each contiguous (N, S, H, D). ``out`` is contiguous, ``dout`` has any strides. Two launches."""
    q, k, v = alike(q, k, v)
    dout = dout.contiguous()
    n, seq, heads, head_dim = q.shape
    arch, split = device_facts(q.device).arch, HEAD_SPLITS[head_dim]
    tail_out = result_tail(split, arch)
    delta = torch.empty_like(lse)
    dq, dk, dv = q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)
    sizes = (q.stride(0), q.stride(1), dout.stride(0), dout.stride(1), seq, scale)
    with device_guard(q):
        tile = dq_tile or tile_for("dq", arch=arch, head_dim=head_dim, dtype=q.dtype)
        qs, dos = (_sources(x, tile.rows, split, tail_out, tile) for x in (q, dout))
        ks, vs = (_sources(x, tile.steps, split, tail_out, tile) for x in (k, v))
        attention_dq_kernel[(ceil_div(seq, tile.rows), heads, n)](
            *qs[:2], *ks, *vs[:2], *dos[:2], out, lse, delta, dq, *sizes, **_constants(q, tile, split, tail_out)
        )
        tile = dkdv_tile or tile_for("dkdv", arch=arch, head_dim=head_dim, dtype=q.dtype)
        qs, dos = (_sources(x, tile.steps, split, tail_out, tile) for x in (q, dout))
        ks, vs = (_sources(x, tile.rows, split, tail_out, tile) for x in (k, v))
        attention_dkdv_kernel[(ceil_div(seq, tile.rows), heads, n)](
            *qs, *ks[:2], *vs[:2], *dos, lse, delta, dk, dv, *sizes, **_constants(q, tile, split, tail_out)
        )
    return dq, dk, dv
