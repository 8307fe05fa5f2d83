"""Forwards that `patch` puts in the place of diffusers' own: the same arithmetic on fused ops, channels-last.

Each takes the module it stands in for as ``self`` and the arguments of the forward it replaces. What a module may look
like for its replacement to be exact is said by the guards in `patch`.
"""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from fastcraft.remade import remakeable
from fastcraft_kernels.frozen_conv import frozen_conv2d, frozen_linear
from fastcraft_kernels.geglu import geglu
from fastcraft_kernels.group_norm_silu import group_norm_silu
from fastcraft_kernels.layer_norm import layer_norm


def conv2d(self: Any, x: Tensor) -> Tensor:
    """``nn.Conv2d``; a 1x1 convolution of channels-last pictures is a linear layer over pixels."""
    pointwise = self.kernel_size == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0) and self.groups == 1
    if pointwise and x.is_contiguous(memory_format=torch.channels_last):
        return frozen_linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
    return frozen_conv2d(
        x, self.weight, self.bias, stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups
    )


def group_norm(self: Any, x: Tensor) -> Tensor:
    """``nn.GroupNorm``."""
    make: Any = partial(group_norm_silu, num_groups=self.num_groups, eps=self.eps, silu=False)
    return remakeable(make(x, self.weight, self.bias), make, x, self.weight, self.bias)


def group_norm_then_silu(self: Any, x: Tensor) -> Tensor:
    """``nn.GroupNorm`` whose only reader is a SiLU, which then does nothing."""
    return _normed(self, x, silu=True)


def identity(self: Any, x: Tensor) -> Tensor:
    """The SiLU behind `group_norm_then_silu`."""
    return x


def layer_normed(self: Any, x: Tensor) -> Tensor:
    """``nn.LayerNorm`` over the last dimension."""
    return cast(Tensor, layer_norm(x, self.weight, self.bias, eps=self.eps))


def gated(self: Any, hidden_states: Tensor) -> Tensor:
    """diffusers' ``GEGLU``: both halves of the projection are read once."""
    halves = self.proj(hidden_states)
    return remakeable(geglu(halves), geglu, halves)


def resnet(self: Any, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
    """diffusers' ``ResnetBlock2D``: SiLU in the norms; time embedding and first bias as the second norm's shift."""
    output = _shortcut(self, input_tensor) + _branch(self, _normed(self.norm1, input_tensor, silu=True), temb)
    return output if self.output_scale_factor == 1 else output / self.output_scale_factor


def decoder_block(self: Any, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
    """diffusers' ``UpDecoderBlock2D``: a ResNet's sum is made inside the first norm of the next one.

    Only here does a sum stay within the block that makes it: elsewhere the norm that follows lies in another module.
    """
    first, *others = self.resnets
    branch = _branch(first, _normed(first.norm1, hidden_states, silu=True), temb)
    shortcut = _shortcut(first, hidden_states)
    for block in others:
        norm = block.norm1
        hidden_states, normed = group_norm_silu(
            branch, norm.weight, norm.bias, num_groups=norm.num_groups, eps=norm.eps, residual=shortcut
        )
        branch, shortcut = _branch(block, normed, temb), _shortcut(block, hidden_states)
    hidden_states = shortcut + branch
    for upsampler in self.upsamplers or ():
        hidden_states = upsampler(hidden_states)
    return hidden_states


def picture_to_tokens(self: Any, hidden_states: Tensor) -> tuple[Tensor, int]:
    """The entry of ``Transformer2DModel``: channels-last pictures are rows of tokens already, nothing is moved."""
    tokens = _normed(self.norm, hidden_states, silu=False).permute(0, 2, 3, 1).flatten(1, 2)  # (N, HW, C)
    tokens = _projected(self.proj_in, tokens)
    return tokens, tokens.shape[-1]


def tokens_to_picture(
    self: Any, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
) -> Tensor:
    """The exit of ``Transformer2DModel``: tokens seen as a channels-last picture."""
    tokens = _projected(self.proj_out, hidden_states)
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2) + residual


def transformer_block(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor:
    """diffusers' ``BasicTransformerBlock``: the residual adds happen inside the layer norms that follow them."""
    if self._chunk_size is not None:
        raise ValueError(f"BasicTransformerBlock: a patched block has no chunked feed-forward, got {self._chunk_size}")
    kwargs = cross_attention_kwargs or {}
    _, branch = _layer_normed(self.norm1, hidden_states)
    branch = self.attn1(
        branch,
        encoder_hidden_states=encoder_hidden_states if self.only_cross_attention else None,
        attention_mask=attention_mask,
        **kwargs,
    )
    hidden_states, branch = _layer_normed(self.norm2, branch, hidden_states)
    branch = self.attn2(
        branch, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask, **kwargs
    )
    hidden_states, branch = _layer_normed(self.norm3, branch, hidden_states)
    return self.ff(branch) + hidden_states


def _branch(self: Any, normed: Tensor, temb: Tensor | None) -> Tensor:
    """A ``ResnetBlock2D`` from behind its first norm and SiLU to the sum, which is not made."""
    conv1 = self.conv1
    hidden_states = frozen_conv2d(normed, conv1.weight, None, stride=conv1.stride, padding=conv1.padding)
    shift = conv1.bias.expand(len(hidden_states), -1)  # (N, C)
    if self.time_emb_proj is not None and temb is not None:
        shift = shift + self.time_emb_proj(self.nonlinearity(temb))
    return self.conv2(_normed(self.norm2, hidden_states, silu=True, shift=shift))


def _shortcut(self: Any, x: Tensor) -> Tensor:
    return x if self.conv_shortcut is None else self.conv_shortcut(x)


def _normed(norm: Any, x: Tensor, *, silu: bool, shift: Tensor | None = None) -> Tensor:
    out = group_norm_silu(x, norm.weight, norm.bias, num_groups=norm.num_groups, eps=norm.eps, silu=silu, shift=shift)
    return cast(Tensor, out)


def _layer_normed(norm: Any, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What is normalised, and the norm of it, which trained layers need not keep."""
    make: Any = partial(layer_norm, eps=norm.eps)
    normalised, out = x, make(x, norm.weight, norm.bias, residual=residual)
    if residual is not None:
        normalised, out = out
    return normalised, remakeable(out, make, normalised, norm.weight, norm.bias)


def _projected(layer: Any, tokens: Tensor) -> Tensor:
    """A linear layer, or a 1x1 convolution as one."""
    weight = layer.weight
    return layer(tokens) if weight.dim() == 2 else frozen_linear(tokens, weight.flatten(1), layer.bias)
