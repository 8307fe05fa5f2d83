"""FLOPs of the ops for `torch.utils.flop_counter`, which knows PyTorch's own only.

Importing this module registers them. A multiply-add counts as two. Norms and activations count nothing, as PyTorch's
do. The backward passes of the frozen layers run on PyTorch's ops and are counted there. Attention backward counts five
products, as for PyTorch's own.
"""

from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import fastcraft_kernels.attention
import fastcraft_kernels.cross_attention
import fastcraft_kernels.frozen_conv  # noqa: F401 - the ops have to exist

Shape = tuple[int, ...]
_OPS = torch.ops.fastcraft


@register_flop_formula(_OPS.frozen_conv2d)
def _conv2d(x: Shape, weight: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return 2 * prod(out_shape) * prod(weight[1:])


@register_flop_formula(_OPS.frozen_linear)
def _linear(x: Shape, weight: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return 2 * prod(out_shape) * weight[1]


@register_flop_formula([_OPS.attention, _OPS.cross_attention])
def _attention(q: Shape, k: Shape, *_: Any, **__: Any) -> int:
    return 2 * 2 * prod(q) * k[1]


@register_flop_formula([_OPS.attention_backward, _OPS.cross_attention_backward, _OPS.cross_attention_backward_into])
def _attention_backward(dout: Shape, q: Shape, k: Shape, *_: Any, **__: Any) -> int:
    return 5 * 2 * prod(q) * k[1]
