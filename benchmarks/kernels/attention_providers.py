"""Everybody else's attention on ``(N, S, H, D)``: SDPA's backends one by one, and xformers."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
    """PyTorch's attention by one backend only; refused shapes raise RuntimeError."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2)

    return attend


def xformers(q: Tensor, k: Tensor, v: Tensor) -> Any:
    """``memory_efficient_attention``."""
    if not torch.cuda.is_available():
        raise NotImplementedError("measured on CUDA only")
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise NotImplementedError(f"xformers is not installed: {error}") from error
    return memory_efficient_attention(q, k, v)


OTHERS: dict[str, Callable[..., Any]] = {
    "sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "sdpa efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "xformers": xformers,
}
if not torch.cuda.is_available():
    OTHERS = {"sdpa math": sdpa(SDPBackend.MATH)}
