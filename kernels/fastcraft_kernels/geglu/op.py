"""The public op, its checks, and its registration as ``torch.ops.fastcraft.geglu``."""

from typing import Any

import torch
from torch import Tensor

from fastcraft_kernels.backend import uses_triton
from fastcraft_kernels.geglu import reference


def geglu(x: Tensor) -> Tensor:
    """Gated GELU: ``value * GELU(gate)``, GELU by the exact normal distribution function.

    Args:
        x: ``(..., 2F)`` float32/float16/bfloat16 (float64 in plain PyTorch), any strides; the value half comes first,
            as in diffusers.

    Returns:
        ``(..., F)``, contiguous, dtype of ``x``.

    Raises:
        ValueError: the last dimension is odd, or ``x`` is empty or not of a floating dtype.

    Saves for backward: ``x`` only; GELU and its slope are computed again.
    Source: Shazeer 2020, arXiv:2002.05202, section 2; Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """
    if not x.is_floating_point():
        raise ValueError(f"geglu: x must be of a floating dtype, got {x.dtype}")
    if x.ndim < 1 or x.numel() == 0:
        raise ValueError(f"geglu: x must be (..., 2F) and not empty, got shape {tuple(x.shape)}")
    if x.shape[-1] % 2:
        raise ValueError(f"geglu: the last dimension of x must be even, got shape {tuple(x.shape)}")
    return _geglu(x)


@torch.library.custom_op("fastcraft::geglu", mutates_args=())
def _geglu(x: Tensor) -> Tensor:
    if uses_triton("geglu", x):
        from fastcraft_kernels.geglu.kernel import geglu_forward

        return geglu_forward(x)
    return reference.geglu_forward(x)


@_geglu.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@torch.library.custom_op("fastcraft::geglu_backward", mutates_args=())
def _geglu_backward(dy: Tensor, x: Tensor) -> Tensor:
    if uses_triton("geglu", x):
        from fastcraft_kernels.geglu.kernel import geglu_backward

        return geglu_backward(dy, x)
    return reference.geglu_backward(dy, x)


@_geglu_backward.register_fake
def _(dy: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> Tensor:
    return _geglu_backward(dy, *ctx.saved_tensors)


_geglu.register_autograd(_backward, setup_context=_setup_context)
