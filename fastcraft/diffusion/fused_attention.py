"""Attention processors on the fused ops; like those of `attention`, they take text keys and values from `TextKV`."""

from typing import Any

from torch import Tensor

from fastcraft.diffusion.attention import CrossAttention, SelfAttention
from fastcraft.records import TextKV
from fastcraft_kernels.attention import attention
from fastcraft_kernels.cross_attention import cross_attention
from fastcraft_kernels.cross_attention.tiles import MAX_KEYS


class FusedSelfAttention(SelfAttention):
    """Self-attention by `fastcraft_kernels.attention`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        text_kv: TextKV | None = None,
    ) -> Tensor:
        _refuse_mask(attention_mask)
        query, key, value = (_heads(layer(hidden_states), attn) for layer in (attn.to_q, attn.to_k, attn.to_v))
        return attn.to_out[0](attention(query, key, value).flatten(-2))


class FusedCrossAttention(CrossAttention):
    """Cross-attention by `fastcraft_kernels.cross_attention`.

    Keys and values come from ``text_kv``; without it they are projected from ``encoder_hidden_states``, as diffusers
    does. A row that several samples share is read in place. A text longer than the op's `MAX_KEYS` is attended to by
    PyTorch's own attention.
    """

    def prepare(self, key: Tensor, value: Tensor, *, num_samples: int) -> tuple[Tensor, Tensor]:
        """Key and value ``(R, L, C)`` as they are: nothing is copied for the samples that share a row."""
        return super().prepare(key, value, num_samples=num_samples) if key.shape[1] > MAX_KEYS else (key, value)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        text_kv: TextKV | None = None,
    ) -> Tensor:
        _refuse_mask(attention_mask)
        if text_kv is not None:
            key, value = text_kv.layers[self.name]
        elif encoder_hidden_states is not None:
            key, value = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        else:
            raise ValueError(f"FusedCrossAttention: layer {self.name!r} got neither text_kv nor encoder_hidden_states")
        if key.shape[1] > MAX_KEYS:
            return super().__call__(attn, hidden_states, text_kv=TextKV(layers={self.name: (key, value)}))
        num_shared = hidden_states.shape[0] - key.shape[0] + 1
        query, key, value = (_heads(x, attn) for x in (attn.to_q(hidden_states), key, value))
        out = cross_attention(query, key, value, num_shared=num_shared)
        return attn.to_out[0](out.flatten(-2))


def _heads(x: Tensor, attn: Any) -> Tensor:
    """(N, L, C) -> (N, L, H, C/H): a view."""
    return x.unflatten(-1, (attn.heads, -1))


def _refuse_mask(attention_mask: Tensor | None) -> None:
    if attention_mask is not None:
        raise ValueError(
            f"attention_mask must be None in a patched UNet, got a tensor of shape {tuple(attention_mask.shape)}"
        )
