"""Self-attention as a custom op: saves q, k, v, the output and the log-sum-exp, whoever computes it."""

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcraft_kernels.attention import dispatch
from fastcraft_kernels.attention.dispatch import BACKENDS, SDPA
from fastcraft_kernels.attention.providers import PROVIDERS
from fastcraft_kernels.attention.tiles import HEAD_SPLITS
from fastcraft_kernels.backend import current_backend

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: str = "auto") -> Tensor:
    """Self-attention, ``softmax(q k^T * scale) v`` for every head, without a mask.

    Args:
        q: (N, S, H, D) float16, bfloat16 or float32 (float64 in plain PyTorch only); D is 40, 64, 80 or 160. Any
            strides; slices of one q/k/v projection are read in place.
        k: as ``q``.
        v: as ``q``.
        scale: positive; ``D ** -0.5`` by default.
        backend: ``"auto"``: the process's `set_backend`; its ``"auto"`` takes the dispatch table on CUDA tensors and
            plain PyTorch elsewhere. Or a provider by name: ``"sdpa"`` (PyTorch's own choice), ``"triton"``,
            ``"flash"``, ``"cudnn"``, ``"efficient"``, ``"xformers"``, ``"reference"``.

    Returns:
        (N, S, H, D), dtype of ``q``; contiguous unless ``"sdpa"`` made it.

    Raises:
        ValueError: shapes, dtypes, devices or head width that do not fit; a provider named here that refuses.

    Saves for backward: q, k, v, the output and the log-sum-exp (N, H, S) float32; scores are recomputed.
    Source: Dao et al. 2022, arXiv:2205.14135; 2023, arXiv:2307.08691. We keep two backward kernels and no atomics.
    """
    _check(q, k, v, scale, backend)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    # numbers under torch.compile too: the table has a row for each
    sequence, head_dim = operator.index(q.shape[1]), operator.index(q.shape[-1])
    providers = _providers(
        current_backend(), backend, dispatch.generation(), q.device, q.dtype, head_dim, sequence, grad
    )
    if providers[0] == SDPA:
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
        return out.transpose(1, 2)
    result: Tensor = _attention(q, k, v, scale, *providers)[0]
    return result


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float | None, backend: str) -> None:
    if q.dim() != 4 or 0 in q.shape:
        raise ValueError(f"attention: q must be (N, S, H, D) and not empty, got shape {tuple(q.shape)}")
    if q.shape[-1] not in HEAD_SPLITS:
        widths = ", ".join(map(str, HEAD_SPLITS))
        raise ValueError(f"attention: head width of q must be one of {widths}, got {q.shape[-1]}")
    if q.dtype not in DTYPES:
        raise ValueError(f"attention: q must be float16, bfloat16, float32 or float64, got {q.dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(f"attention: {name} must have q's shape {tuple(q.shape)}, got {tuple(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"attention: {name} must be {q.dtype} on {q.device} like q, got {x.dtype} on {x.device}")
    if scale is not None and not (0 < scale < math.inf):
        raise ValueError(f"attention: scale must be positive and finite, got {scale}")
    if backend not in BACKENDS:
        raise ValueError(f"attention: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


@torch.compiler.assume_constant_result
def _providers(
    setting: str, backend: str, generation: int, device: torch.device, dtype: torch.dtype, head_dim: int, sequence: int,
    grad: bool,
) -> tuple[str, str]:  # fmt: skip
    """Names for both directions. A compiled graph keeps them until an argument changes: hence ``generation``."""
    choice = dispatch.choose_attention(
        setting, backend, device=device, dtype=dtype, head_dim=head_dim, sequence=sequence, grad=grad
    )
    return choice.forward, choice.backward


def _rows(x: Tensor) -> Tensor:
    """``x``, its head rows contiguous: no provider reads others."""
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("fastcraft::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, forward: str, backward: str) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; ``backward`` is for the gradient formula."""
    return PROVIDERS[forward].forward(_rows(q), _rows(k), _rows(v), scale)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, forward: str, backward: str) -> tuple[Tensor, Tensor]:
    n, seq, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((n, heads, seq), dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("fastcraft::attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, backward: str
) -> tuple[Tensor, Tensor, Tensor]:
    return PROVIDERS[backward].backward(dout.contiguous(), _rows(q), _rows(k), _rows(v), out, lse, scale)


@_attention_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, backward: str
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, _, ctx.backward_provider = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output)


def _gradient(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*_attention_backward(dout, *ctx.saved_tensors, ctx.scale, ctx.backward_provider), None, None, None)


_attention.register_autograd(_gradient, setup_context=_setup)
