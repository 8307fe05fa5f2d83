"""One float32 sum for the gradients that all denoising steps send to a prompt's keys and values."""

from typing import Any

import torch
from torch import Tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, k_sum: Tensor, v_sum: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.dtype = k.dtype
        ctx.sums = (k_sum, v_sum)  # they change between backward passes, which saved tensors must not
        return k.view_as(k), v.view_as(v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        results = []
        for total, grad in zip(ctx.sums, grads, strict=True):
            results.append((total if grad is None else total + grad).to(ctx.dtype, copy=True))
            total.zero_()
        return (*results, None, None)


def gather_kv_gradients(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Let the gradients of many attention calls meet in float32 before they go on to the text.

    Autograd would add the gradients of all denoising steps in the dtype of ``k``, in a launch each. Here they are added
    in float32 by the kernel that makes them, and sent on once, when the last call has had its backward pass.

    Args:
        k: (N, L, H, D) or (1, L, H, D), any float dtype; once per prompt and layer, before the first step.
        v: as ``k``.

    Returns:
        ``k`` and ``v`` (views) and the float32 sums, for ``cross_attention(q, k, v, sums=sums)`` at every step. Uses of
        the views outside of it get their gradient as usual. Every backward pass over a retained graph starts from zero;
        one that ends before ``k`` and ``v`` adds nothing. One has to name what lies behind the views, not the views.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if k.shape != v.shape or k.dtype != v.dtype or not k.is_floating_point():
        raise ValueError(
            "gather_kv_gradients: k and v must be of one float dtype and shape, "
            f"got {k.dtype} of {tuple(k.shape)} and {v.dtype} of {tuple(v.shape)}"
        )
    wide = torch.promote_types(k.dtype, torch.float32)
    sums = (k.new_zeros(k.shape, dtype=wide), v.new_zeros(v.shape, dtype=wide))
    gathered_k, gathered_v = _Gather.apply(k, v, *sums)
    return gathered_k, gathered_v, sums
