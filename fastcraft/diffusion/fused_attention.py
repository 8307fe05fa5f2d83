"""Attention processors on the fused ops; like those of `attention`, they take the text from `Conditioning`."""

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from fastcraft.diffusion.attention import CrossAttention, Prepared, SelfAttention
from fastcraft.diffusion.conditioning import Conditioning
from fastcraft.remade import remakeable
from fastcraft_kernels.attention import attention
from fastcraft_kernels.cross_attention import cross_attention, gather_kv_gradients
from fastcraft_kernels.cross_attention.tiles import MAX_KEYS

logger = logging.getLogger(__name__)


class FusedSelfAttention(SelfAttention):
    """Self-attention by `fastcraft_kernels.attention`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        conditioning: Conditioning | None = None,
    ) -> Tensor:
        _refuse_mask(attention_mask)
        query, key, value = (_heads(layer(hidden_states), attn) for layer in (attn.to_q, attn.to_k, attn.to_v))
        return attn.to_out[0](attention(query, key, value).flatten(-2))


class FusedCrossAttention(CrossAttention):
    """Cross-attention by `fastcraft_kernels.cross_attention`.

    Keys and values come from ``conditioning``; without it they are projected from ``encoder_hidden_states``, as
    diffusers does. A row that several samples share is read in place. A text longer than the op's `MAX_KEYS` is
    attended to by PyTorch's own attention.
    """

    def prepare(self, key: Tensor, value: Tensor, *, num_samples: int) -> Prepared:
        """Key and value ``(R, L, C)`` as they are, where gradients are computed with the float32 sums in which those of
        all denoising steps meet; they go on to the text in one piece. Nothing is copied for samples that share a row.
        """
        if key.shape[1] > MAX_KEYS:
            return super().prepare(key, value, num_samples=num_samples)
        if not torch.is_grad_enabled() or not key.requires_grad or _is_compiling():
            return key, value, None
        return gather_kv_gradients(key, value)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        conditioning: Conditioning | None = None,
    ) -> Tensor:
        _refuse_mask(attention_mask)
        sums = None
        if conditioning is not None:
            key, value = conditioning.layers[self.name]
            sums = conditioning.sums.get(self.name)
        elif encoder_hidden_states is not None:
            key, value = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        else:
            raise ValueError(
                f"FusedCrossAttention: layer {self.name!r} got neither conditioning nor encoder_hidden_states"
            )
        if key.shape[1] > MAX_KEYS:
            return super().__call__(attn, hidden_states, conditioning=Conditioning(layers={self.name: (key, value)}))
        num_shared = hidden_states.shape[0] - key.shape[0] + 1
        query, key, value = (_heads(x, attn) for x in (attn.to_q(hidden_states), key, value))
        if sums is not None:
            sums = None if _is_compiling() else (_heads(sums[0], attn), _heads(sums[1], attn))
        out = cross_attention(query, key, value, num_shared=num_shared, sums=sums).flatten(-2)
        again = functools.partial(_cross_attend, num_shared=num_shared)
        return attn.to_out[0](remakeable(out, again, query, key, value))


def _cross_attend(query: Tensor, key: Tensor, value: Tensor, *, num_shared: int) -> Tensor:
    return cross_attention(query, key, value, num_shared=num_shared).flatten(-2)


def _is_compiling() -> bool:
    """Whether ``torch.compile`` is tracing, whose graphs refuse the sums; said where it is."""
    if not torch.compiler.is_compiling():
        return False
    _say_once()
    return True


@torch.compiler.assume_constant_result  # run by the tracer itself, and no break in its graph
def _say_once() -> None:
    _say()


@functools.cache
def _say() -> None:
    logger.warning(
        "in a graph of torch.compile, autograd adds up the gradients that denoising steps send to the text's keys and "
        "values, in the network's dtype; outside of one it is done in float32"
    )


def _heads(x: Tensor, attn: Any) -> Tensor:
    """(N, L, C) -> (N, L, H, C/H): a view."""
    return x.unflatten(-1, (attn.heads, -1))


def _refuse_mask(attention_mask: Tensor | None) -> None:
    if attention_mask is not None:
        raise ValueError(
            f"attention_mask must be None in a patched UNet, got a tensor of shape {tuple(attention_mask.shape)}"
        )
