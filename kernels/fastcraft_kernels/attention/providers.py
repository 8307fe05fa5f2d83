"""Who can compute self-attention: our kernels, PyTorch's three fused backends, xformers, plain PyTorch.

Each provider gives the forward pass and the backward pass by themselves, so that one can serve a direction in which it
is fast and another the other. They meet in one convention: tensors (N, S, H, D), the log-sum-exp natural, float32,
(N, H, S). The only file that imports xformers.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcraft_kernels.attention.reference import attention_backward_reference, attention_forward_reference
from fastcraft_kernels.backend import triton_refusal

aten: Any = torch.ops.aten
Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Provider:
    """``forward(q, k, v, scale) -> (out, lse)``, ``backward(dout, q, k, v, out, lse, scale) -> (dq, dk, dv)``.

    ``refusal(device, dtype, head_dim)`` says why the provider cannot serve such tensors, or ``None``.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Gradients]
    refusal: Callable[[torch.device, torch.dtype, int], str | None]


def _swap(x: Tensor) -> Tensor:
    """(N, S, H, D) <-> (N, H, S, D)."""
    return x.transpose(1, 2)


def _back(*grads: Tensor) -> Gradients:
    dq, dk, dv = (_swap(x).contiguous() for x in grads)
    return dq, dk, dv


def _no_seed(x: Tensor) -> Tensor:
    """PyTorch's backward passes ask for the dropout seed of the forward pass; without dropout nobody reads it."""
    return torch.zeros((), dtype=torch.int64, device=x.device)


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_flash_attention(_swap(q), _swap(k), _swap(v), scale=scale)
    return _swap(out).contiguous(), lse


def _flash_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float) -> Gradients:
    seq, seed = q.shape[1], _no_seed(q)
    return _back(
        *aten._scaled_dot_product_flash_attention_backward(
            _swap(dout), _swap(q), _swap(k), _swap(v), _swap(out), lse, None, None, seq, seq, 0.0, False, seed, seed,
            scale=scale,
        )
    )  # fmt: skip


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(_swap(q), _swap(k), _swap(v), None, True, scale=scale)
    return _swap(out).contiguous(), lse.view(q.shape[0], q.shape[2], q.shape[1])


def _cudnn_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float) -> Gradients:
    seq, seed = q.shape[1], _no_seed(q)
    return _back(
        *aten._scaled_dot_product_cudnn_attention_backward(
            _swap(dout), _swap(q), _swap(k), _swap(v), _swap(out), lse[..., None], seed, seed, None, None, None,
            seq, seq, 0.0, False, scale=scale,
        )
    )  # fmt: skip


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(_swap(q), _swap(k), _swap(v), None, True, scale=scale)
    return _swap(out).contiguous(), lse[..., : q.shape[1]].contiguous()


def _padded(lse: Tensor) -> Tensor:
    """Rows filled up to a multiple of 32 with infinity, as the memory-efficient backward pass expects them."""
    return F.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))


def _efficient_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Gradients:
    seed = _no_seed(q)
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        _swap(dout), _swap(q), _swap(k), _swap(v), None, _swap(out), _padded(lse), seed, seed, 0.0,
        [True, True, True, False], scale=scale,
    )  # fmt: skip
    return _back(dq, dk, dv)


def _xformers_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from xformers.ops import fmha

    out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, scale=scale)
    return out.contiguous(), lse[..., : q.shape[1]].contiguous()


def _xformers_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Gradients:
    from xformers.ops import fmha

    dq, dk, dv = fmha.memory_efficient_attention_backward(dout, out, lse, q, k, v, scale=scale)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _triton_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from fastcraft_kernels.attention.launcher import attention_forward

    return attention_forward(q, k, v, scale=scale)


def _triton_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Gradients:
    from fastcraft_kernels.attention.launcher import attention_backward

    return attention_backward(dout, q, k, v, out, lse, scale=scale)


def _reference_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return attention_forward_reference(q, k, v, scale=scale)


def _reference_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Gradients:
    return attention_backward_reference(dout, q, k, v, out, lse, scale=scale)


def _fused_refusal(
    name: str, *, half_only: bool, widest: int
) -> Callable[[torch.device, torch.dtype, int], str | None]:
    def refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if name == "xformers" and importlib.util.find_spec("xformers") is None:
            return "the package xformers is not installed"
        if device.type != "cuda":
            return f"{name} needs a CUDA device, not {device.type}"
        if dtype not in (torch.float16, torch.bfloat16) and (half_only or dtype != torch.float32):
            return f"{name} does not take {dtype}"
        if head_dim > widest:
            return f"{name} takes head widths up to {widest} in its backward pass, not {head_dim}"
        return None

    return refusal


PROVIDERS = {
    "reference": Provider(
        forward=_reference_forward, backward=_reference_backward, refusal=lambda device, dtype, head_dim: None
    ),
    "triton": Provider(
        forward=_triton_forward,
        backward=_triton_backward,
        refusal=lambda device, dtype, head_dim: triton_refusal(device, dtype),
    ),
    "flash": Provider(
        forward=_flash_forward, backward=_flash_backward, refusal=_fused_refusal("flash", half_only=True, widest=256)
    ),
    "cudnn": Provider(
        forward=_cudnn_forward, backward=_cudnn_backward, refusal=_fused_refusal("cudnn", half_only=True, widest=128)
    ),
    "efficient": Provider(
        forward=_efficient_forward,
        backward=_efficient_backward,
        refusal=_fused_refusal("efficient", half_only=False, widest=256),
    ),
    "xformers": Provider(
        forward=_xformers_forward,
        backward=_xformers_backward,
        refusal=_fused_refusal("xformers", half_only=False, widest=256),
    ),
}
