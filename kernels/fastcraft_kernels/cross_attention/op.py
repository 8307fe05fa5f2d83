"""Cross-attention as a custom op that saves q, and k and v, which exist anyway."""

import math
from typing import Any

import torch
from torch import Tensor

from fastcraft_kernels.attention.tiles import HEAD_SPLITS
from fastcraft_kernels.backend import uses_triton
from fastcraft_kernels.cross_attention.reference import (
    cross_attention_backward_reference,
    cross_attention_forward_reference,
)
from fastcraft_kernels.cross_attention.tiles import MAX_KEYS

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, num_shared: int = 1,
    sums: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """``softmax(q k^T * scale) v`` for every head: many queries, the keys and values of a text.

    Args:
        q: (N, S, H, D) float16, bfloat16 or float32 (float64 in plain PyTorch only); D is 40, 64, 80 or 160.
        k: (N - num_shared + 1, L, H, D) with L from 1 to 512, dtype of ``q``; or (1, L, H, D), shared by all samples. A
            tensor expanded from one row is read in place too, but gets a gradient per row.
        v: as ``k``.
        scale: positive; ``D ** -0.5`` by default.
        num_shared: so many of the first samples read row 0 of ``k`` and ``v``, the others a row each. With guidance it
            is the unconditional half of a batch. Nothing is copied for them, and the gradient of that row is summed
            over them in float32.
        sums: what `gather_kv_gradients` returned beside ``k`` and ``v``: the backward pass adds dK and dV to these in
            float32, and ``k`` and ``v`` get no gradient from this call. Not under ``torch.compile``, which keeps them
            as saved tensors and refuses that they change between the steps' backward passes.

    Returns:
        (N, S, H, D), contiguous, dtype of ``q``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, too many keys, a head width without a kernel; ``sums``
            under ``torch.compile``.

    Saves for backward: q, k, v; no output, no statistics. dQ, dK and dV are bit-equal from run to run.
    Source: Dao et al. 2022, arXiv:2205.14135, appendix B; keys in one block and split queries are ours.
    """
    _check(q, k, v, scale, num_shared)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    if k.shape[0] == 1:
        num_shared = q.shape[0]
    if sums is not None:
        if torch.compiler.is_compiling():
            raise ValueError("cross_attention: sums must be None under torch.compile, whose graphs refuse their change")
        _check_sums(k, v, sums)
    result: Tensor = _cross_attention(q, k, v, scale, num_shared, *(sums or (None, None)))
    return result


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float | None, num_shared: int) -> None:
    if q.dim() != 4 or 0 in q.shape:
        raise ValueError(f"cross_attention: q must be (N, S, H, D) and not empty, got shape {tuple(q.shape)}")
    n, _, heads, width = q.shape
    if width not in HEAD_SPLITS:
        widths = ", ".join(map(str, HEAD_SPLITS))
        raise ValueError(f"cross_attention: head width of q must be one of {widths}, got {width}")
    if q.dtype not in DTYPES:
        raise ValueError(f"cross_attention: q must be float16, bfloat16, float32 or float64, got {q.dtype}")
    if not 1 <= num_shared <= n:
        raise ValueError(f"cross_attention: num_shared must be 1 to {n}, the samples of q, got {num_shared}")
    rows = n - num_shared + 1  # compared one by one: sizes may be symbols of torch.compile, which "in" does not compare
    if k.dim() != 4 or not (k.shape[0] == 1 or k.shape[0] == rows) or k.shape[2] != heads or k.shape[3] != width:
        wanted = f"({rows} or 1, L, {heads}, {width})"
        raise ValueError(f"cross_attention: k must be {wanted} to fit q, got shape {tuple(k.shape)}")
    if not 1 <= k.shape[1] <= MAX_KEYS:
        raise ValueError(f"cross_attention: k must hold 1 to {MAX_KEYS} keys, got {k.shape[1]}")
    if v.shape != k.shape:
        raise ValueError(f"cross_attention: v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"cross_attention: {name} must be {q.dtype} on {q.device} like q, got {x.dtype} on {x.device}"
            )
    if scale is not None and not (0 < scale < math.inf):
        raise ValueError(f"cross_attention: scale must be positive and finite, got {scale}")


def _check_sums(k: Tensor, v: Tensor, sums: tuple[Tensor, Tensor]) -> None:
    wanted = torch.promote_types(k.dtype, torch.float32)
    for x, total in zip((k, v), sums, strict=True):
        if total.shape != x.shape or total.dtype != wanted or total.device != x.device or not total.is_contiguous():
            raise ValueError(
                f"cross_attention: sums must be contiguous {wanted} of shape {tuple(x.shape)} on {x.device}, "
                f"got {total.dtype} of shape {tuple(total.shape)} on {total.device}"
            )


@torch.library.custom_op("fastcraft::cross_attention", mutates_args=())
def _cross_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, num_shared: int, k_sum: Tensor | None, v_sum: Tensor | None
) -> Tensor:
    """The sums are for the gradient formula."""
    if uses_triton("cross_attention", q):
        from fastcraft_kernels.cross_attention.launcher import cross_attention_forward

        return cross_attention_forward(q, k, v, scale=scale, num_shared=num_shared)
    return cross_attention_forward_reference(q, k, v, scale=scale, num_shared=num_shared)


@torch.library.custom_op("fastcraft::cross_attention_backward", mutates_args=())
def _cross_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, num_shared: int, need_kv: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV; the last two empty (of one dimension) without ``need_kv``."""
    if uses_triton("cross_attention", q):
        from fastcraft_kernels.cross_attention.launcher import cross_attention_backward

        dq, dk, dv = cross_attention_backward(dout, q, k, v, scale=scale, num_shared=num_shared, need_kv=need_kv)
    else:
        dq, dk, dv = cross_attention_backward_reference(dout, q, k, v, scale=scale, num_shared=num_shared)
        dk, dv = dk.to(k.dtype), dv.to(v.dtype)
    if dk is None or dv is None or not need_kv:
        return dq, k.new_empty(0), v.new_empty(0)
    return dq, dk, dv


@torch.library.custom_op("fastcraft::cross_attention_backward_into", mutates_args=("k_sum", "v_sum"))
def _cross_attention_backward_into(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, k_sum: Tensor, v_sum: Tensor, scale: float, num_shared: int
) -> Tensor:
    """dQ; dK and dV are added to the sums."""
    if uses_triton("cross_attention", q):
        from fastcraft_kernels.cross_attention.launcher import cross_attention_backward

        return cross_attention_backward(
            dout, q, k, v, scale=scale, num_shared=num_shared, k_sum=k_sum, v_sum=v_sum
        )[0]  # fmt: skip
    dq, dk, dv = cross_attention_backward_reference(dout, q, k, v, scale=scale, num_shared=num_shared)
    k_sum += dk
    v_sum += dv
    return dq


@_cross_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, scale: float, num_shared: int, k_sum: Tensor | None, v_sum: Tensor | None
) -> Tensor:
    return q.new_empty(q.shape)


@_cross_attention_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, num_shared: int, need_kv: bool
) -> tuple[Tensor, Tensor, Tensor]:
    shape = k.shape if need_kv else (0,)
    return q.new_empty(q.shape), k.new_empty(shape), v.new_empty(shape)


@_cross_attention_backward_into.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, k_sum: Tensor, v_sum: Tensor, scale: float, num_shared: int
) -> Tensor:
    return q.new_empty(q.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # the sums change between backward passes, which saved tensors must not
    q, k, v, ctx.scale, ctx.num_shared, *ctx.sums = inputs
    ctx.save_for_backward(q, k, v)


def _gradient(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    rest = (None,) * 4
    need_kv = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    if need_kv and ctx.sums[0] is not None:
        # of a pass that ends before the text nothing may go into the sums, because nobody would take it out
        if torch._C._will_engine_execute_node(ctx.next_functions[1][0]):
            dq = _cross_attention_backward_into(dout, *ctx.saved_tensors, *ctx.sums, ctx.scale, ctx.num_shared)
            return dq, None, None, *rest
        need_kv = False
    dq, dk, dv = _cross_attention_backward(dout, *ctx.saved_tensors, ctx.scale, ctx.num_shared, need_kv)
    return (dq, dk, dv, *rest) if need_kv else (dq, None, None, *rest)


_cross_attention.register_autograd(_gradient, setup_context=_setup)
