"""Attention processors: self-attention by SDPA, cross-attention over text keys and values projected in advance."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastcraft.records import TextKV


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """(N, L, C) -> (N, H, L, C/H)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _attend(attn: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    num_heads = attn.heads
    out = F.scaled_dot_product_attention(_heads(query, num_heads), _heads(key, num_heads), _heads(value, num_heads))
    return attn.to_out[0](out.transpose(1, 2).flatten(-2))


class SelfAttention:
    """Plain self-attention; accepts and ignores the text keys that travel to every processor."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        text_kv: TextKV | None = None,
    ) -> Tensor:
        return _attend(attn, attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))


class CrossAttention:
    """Cross-attention whose keys and values come from ``text_kv``, not from ``encoder_hidden_states``.

    Args:
        name: the layer's key in `TextKV.layers`.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        text_kv: TextKV | None = None,
    ) -> Tensor:
        if text_kv is None:
            raise ValueError(f"CrossAttention: layer {self.name!r} got no text_kv; pass it in cross_attention_kwargs")
        return _attend(attn, attn.to_q(hidden_states), *text_kv.layers[self.name])
