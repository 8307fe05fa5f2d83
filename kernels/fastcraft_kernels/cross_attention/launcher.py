"""Starts the cross-attention kernels: layouts, blocks of keys, splits of queries, partial sums."""

from typing import Any

import torch
from torch import Tensor

from fastcraft_kernels.attention.launcher import alike, is_aligned, result_tail
from fastcraft_kernels.attention.tiles import HEAD_SPLITS, Tile
from fastcraft_kernels.cross_attention.kernel import (
    cross_dkdv_kernel,
    cross_dq_kernel,
    cross_forward_kernel,
    cross_sum_kernel,
)
from fastcraft_kernels.cross_attention.tiles import KeyBlocks, key_blocks, query_tile, split_queries
from fastcraft_kernels.launch import ceil_div, device_facts, device_guard, dot_in_float32

SUM_BLOCK = 1024


def _layout(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """q, k, v as the kernels read them, and the batch stride of k and v: 0 where they were expanded from one row."""
    expanded = k.stride(0) == 0 == v.stride(0)
    k, v = alike(k[0][None], v[0][None]) if expanded else alike(k, v)
    return q if is_aligned(q) else q.contiguous(), k, v, 0 if expanded else k.stride(0)


def _constants(q: Tensor, k: Tensor, tile: Tile, blocks: KeyBlocks) -> dict[str, Any]:
    seq, heads, head_dim = q.shape[1:]
    split = HEAD_SPLITS[head_dim]
    tail_out = result_tail(split, device_facts(q.device).arch)
    return {
        "Q_STRIDE_H": q.stride(2), "H_STRIDE": k.stride(2), "H": heads, "D": head_dim,
        "HEAD": split.head, "TAIL": split.tail, "TAIL_OUT": max(tail_out, 1),
        "ROWS": tile.rows, "EVEN_ROWS": seq % tile.rows == 0,
        "BLOCKS": blocks.count, "FIRST": blocks.first, "REST": blocks.rest,
        "FIRST_FULL": blocks.first_full, "REST_FULL": blocks.rest_full, "DOT_F32": dot_in_float32(),
        "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip


def _plan(kernel: str, q: Tensor, k: Tensor, tile: Tile | None) -> tuple[Tile, KeyBlocks, dict[str, Any]]:
    arch = device_facts(q.device).arch
    blocks = key_blocks(k.shape[1], kernel=kernel, arch=arch, head_dim=q.shape[-1], dtype=q.dtype)
    tile = tile or query_tile(kernel, arch=arch, head_dim=q.shape[-1], dtype=q.dtype, num_blocks=blocks.count)
    return tile, blocks, _constants(q, k, tile, blocks)


def cross_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, num_shared: int = 1, tile: Tile | None = None
) -> Tensor:
    """Output, contiguous (N, S, H, D); k and v are (N - num_shared + 1, L, H, D). One launch."""
    q, k, v, stride_n = _layout(q, k, v)
    n, seq, heads, _ = q.shape
    tile, _, constants = _plan("forward", q, k, tile)
    out = q.new_empty(q.shape)
    with device_guard(q):
        cross_forward_kernel[(ceil_div(seq, tile.rows), heads, n)](
            q, k, v, out, q.stride(0), q.stride(1), stride_n, k.stride(1), num_shared, seq, k.shape[1], scale,
            **constants,
        )  # fmt: skip
    return out


def cross_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *, scale: float, num_shared: int = 1, need_kv: bool = True,
    k_sum: Tensor | None = None, v_sum: Tensor | None = None,
    dq_tile: Tile | None = None, dkdv_tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """dQ, dK, dV, contiguous, in the shapes of q, k, v; shared keys and values get the sum over their samples.

    Three launches, one without ``need_kv``. With ``k_sum`` and ``v_sum`` (float32, contiguous, in k's and v's shape) dK
    and dV are added to these and ``None`` is returned for both. ``dout`` has any strides.
    """
    shape = k.shape
    q, k, v, stride_n = _layout(q, k, v)
    dout = dout.contiguous()
    n, seq, heads, _ = q.shape
    dq, lse = q.new_empty(q.shape), q.new_empty((n, heads, seq), dtype=torch.float32)
    delta = torch.empty_like(lse)
    strides = (q.stride(0), q.stride(1), stride_n, k.stride(1), num_shared)
    with device_guard(q):
        tile, _, constants = _plan("dq", q, k, dq_tile)
        cross_dq_kernel[(ceil_div(seq, tile.rows), heads, n)](
            q, k, v, dout, dq, lse, delta, *strides, seq, shape[1], scale, **constants
        )
        if not need_kv:
            return dq, None, None
        tile, blocks, constants = _plan("dkdv", q, k, dkdv_tile)
        splits, size = split_queries(
            device_facts(q.device), num_queries=seq, num_heads=n * heads, blocks=blocks.count, rows=tile.rows
        )
        dk_parts, dv_parts = (q.new_empty((splits * n, *shape[1:]), dtype=torch.float32) for _ in range(2))
        cross_dkdv_kernel[(splits * blocks.count, heads, n)](
            q, k, v, dout, lse, delta, dk_parts, dv_parts, *strides, n, seq, shape[1], scale, size, **constants
        )
        add = k_sum is not None
        dk, dv = (k_sum, v_sum) if add else (k.new_empty(shape), v.new_empty(shape))
        numbers = dk_parts[0].numel()
        cross_sum_kernel[(ceil_div(numbers, SUM_BLOCK), shape[0])](
            dk_parts, dv_parts, dk, dv, numbers, splits, n, num_shared, BLOCK=SUM_BLOCK, ADD=add, num_warps=4
        )
    return (dq, None, None) if add else (dq, dk, dv)
