"""Inputs of trained layers that nobody keeps: backward makes them again from what is kept anyway.

The weight gradient of a layer behind a norm needs the norm's output. The norm's own backward keeps what it normalised,
which is as large: a pass over it is cheaper than the bytes of a second tensor. Who makes such a tensor marks it with
`remakeable`; who trains a weight on it calls `linear`. Neither has to know the other.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_MARK = "_fastcraft_remade"


def remakeable(out: Tensor, make: Callable[..., Tensor], *kept: Tensor) -> Tensor:
    """Mark ``out`` as something that ``make(*kept)`` gives again, to the bit.

    Args:
        out: just computed.
        make: runs in backward, without gradient; holds no tensors.
        kept: the very tensors that the backward of ``out`` keeps, so that they cost nothing.

    Returns:
        ``out``; unmarked where no gradient will come, and in a graph of ``torch.compile``, which decides by itself.
    """
    if not torch.compiler.is_compiling() and torch.is_grad_enabled() and out.requires_grad:
        setattr(out, _MARK, (_Maker(make), kept))
    return out


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``F.linear(x, weight)`` in the dtype of ``x``.

    Args:
        x: ``(..., C)``; kept for backward unless it is marked.
        weight: ``(O, C)`` of any float dtype. Of a marked ``x`` no cast is kept either; its gradients are the same to
            the bit, and can be differentiated no further.
    """
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):  # it does not know that device
        return F.linear(x, weight)  # torch casts by itself, once for all uses
    mark = getattr(x, _MARK, None)
    if mark is None or not (torch.is_grad_enabled() and weight.requires_grad):
        return F.linear(x, weight.to(x.dtype))
    maker, kept = mark
    out: Tensor = _Linear.apply(maker, x, weight, *kept)
    return out


class _Maker:
    """Shared by all layers that read one tensor: in a pass of backward it is made once, and freed by the last of them.

    If a pass leaves some of them out, it stays until the next pass or until the graph is freed.
    """

    def __init__(self, make: Callable[..., Tensor]) -> None:
        self._make = make
        self.num_readers = 0
        self._left = 0
        self._made: Tensor | None = None

    def take(self, kept: tuple[Tensor, ...]) -> Tensor:
        """The tensor, for one of its readers."""
        made = self._made
        if made is None:
            made, self._left = self._make(*kept), self.num_readers
        self._left -= 1
        self._made = made if self._left else None
        return made


class _Linear(torch.autograd.Function):
    """Saves what its input is made from; the gradient to the input itself takes the usual way."""

    @staticmethod
    def forward(ctx: Any, maker: _Maker, x: Tensor, weight: Tensor, *kept: Tensor) -> Tensor:
        maker.num_readers += 1
        ctx.maker = maker
        ctx.save_for_backward(weight, *kept)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        x = ctx.maker.take(kept)
        rows = gradient.reshape(-1, gradient.shape[-1])
        d_x = (rows @ weight.to(gradient.dtype)).view(x.shape) if ctx.needs_input_grad[1] else None
        d_weight = (rows.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        return None, d_x, d_weight, *[None] * len(kept)
