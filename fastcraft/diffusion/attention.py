"""Attention processors: self-attention by SDPA, cross-attention over text keys and values projected in advance."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcraft.diffusion.conditioning import Conditioning

Prepared = tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]
"""Key, value, and the sums of their gradients, if the layer has such."""


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """(N, L, C) -> (N, H, L, C/H)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _attend(attn: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, value = (_heads(x, attn.heads) for x in (query, key, value))
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        # the CPU's fused backward in bfloat16 takes longer than the plain product (benchmarks/LOG.md)
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        out = scores.softmax(dim=-1) @ value
    else:
        out = F.scaled_dot_product_attention(query, key, value)
    return attn.to_out[0](out.transpose(1, 2).flatten(-2))


class SelfAttention:
    """Plain self-attention; accepts and ignores the text keys that travel to every processor."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        conditioning: Conditioning | None = None,
    ) -> Tensor:
        return _attend(attn, attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))


def _row_each(x: Tensor, num_samples: int) -> Tensor:
    """Keys or values of `Conditioning` with a row for every sample: as they are, or a copy."""
    num_shared = num_samples - x.shape[0] + 1
    return x if num_shared == 1 else torch.cat([x[:1].expand(num_shared, -1, -1), x[1:]])


class CrossAttention:
    """Cross-attention whose keys and values come from ``conditioning``, not from ``encoder_hidden_states``.

    Args:
        name: the layer's key in `Conditioning.layers`.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def prepare(self, key: Tensor, value: Tensor, *, num_samples: int) -> Prepared:
        """Projected text as this layer's entries in `Conditioning`, once per prompt.

        Args:
            key: ``(R, L, C)``; rows as in `Conditioning`.
            value: as ``key``.
            num_samples: N.

        Returns:
            Key and value with a row for every sample, and no sums. PyTorch's attention could read a shared row in
            place, by a call for the samples that share it and one for the others, but these two take longer at every
            denoising step than one copy for all steps (benchmarks/LOG.md).
        """
        return _row_each(key, num_samples), _row_each(value, num_samples), None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        conditioning: Conditioning | None = None,
    ) -> Tensor:
        if conditioning is None:
            raise ValueError(
                f"CrossAttention: layer {self.name!r} got no conditioning; pass it in cross_attention_kwargs"
            )
        key, value = (_row_each(x, hidden_states.shape[0]) for x in conditioning.layers[self.name])
        return _attend(attn, attn.to_q(hidden_states), key, value)
