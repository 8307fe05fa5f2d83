"""Forwards that `patch` puts in the place of transformers' own in a reward's image tower: CLIP's and BLIP's.

Each takes the module it stands in for as ``self`` and the arguments of the forward it replaces. Shape letters: B
pictures, L tokens (257 for ViT-L/14 and ViT-H/14 at 224 pixels), D features.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastcraft_kernels.attention import attention
from fastcraft_kernels.layer_norm import layer_norm

QUICK = 1.702
"""The slope of CLIP's quick GELU, ``x sigmoid(1.702 x)``."""


def layer(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """``CLIPEncoderLayer`` and ``BlipEncoderLayer``: the first residual add happens inside the second norm."""
    _refuse_mask(attention_mask)
    norm1, norm2 = self.layer_norm1, self.layer_norm2
    normed = layer_norm(hidden_states, norm1.weight, norm1.bias, eps=norm1.eps)
    branch = self.self_attn(hidden_states=normed, **kwargs)[0]
    hidden_states, branch = layer_norm(branch, norm2.weight, norm2.bias, eps=norm2.eps, residual=hidden_states)
    return hidden_states + self.mlp(branch)


def clip_attention(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """``CLIPAttention`` without a mask: ``(B, L, D)`` and, in the place of the attention weights, nothing."""
    _refuse_mask(attention_mask)
    _refuse_weights(kwargs)
    query, key, value = (
        layer(hidden_states).unflatten(-1, (self.num_heads, -1)) for layer in (self.q_proj, self.k_proj, self.v_proj)
    )
    return self.out_proj(attention(query, key, value, scale=self.scale).flatten(-2)), None


def blip_attention(self: Any, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
    """``BlipAttention``, which writes its scores out and keeps them: ``(B, L, D)``, and no attention weights."""
    _refuse_weights(kwargs)
    query, key, value = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
    return self.projection(attention(query, key, value, scale=self.scale).flatten(-2)), None


def quick_gelu(self: Any, input: Tensor) -> Tensor:
    """``QuickGELUActivation`` as a SiLU of another slope, which keeps one tensor instead of two."""
    return F.silu(QUICK * input) / QUICK


def _refuse_mask(attention_mask: Tensor | None) -> None:
    if attention_mask is not None:
        raise ValueError(
            f"attention_mask must be None in a patched image tower, got a tensor of shape {tuple(attention_mask.shape)}"
        )


def _refuse_weights(kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions must be off in a patched image tower, which never has them; got True")
