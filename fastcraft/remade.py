"""Inputs of trained layers that nobody keeps: backward makes them again from what is kept anyway.

The weight gradient of a layer behind a norm needs the norm's output. The norm's own backward keeps what it normalised,
which is as large: a pass over it is cheaper than the bytes of a second tensor. Who makes such a tensor marks it with
`remakeable`; who trains a weight on it calls `linear` or `conv2d`. Neither has to know the other.
"""

from collections.abc import Callable, Sequence
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
    if torch.is_grad_enabled() and out.requires_grad and not torch.compiler.is_compiling():
        setattr(out, _MARK, (_Maker(make), kept))
    return out


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``F.linear(x, weight)`` in the dtype of ``x``.

    Args:
        x: ``(..., C)``; kept for backward unless it is marked.
        weight: ``(O, C)`` of any float dtype. Of a marked ``x`` no cast is kept either; its gradients are the same to
            the bit, and can be differentiated no further.
    """
    mark = _mark(x, weight)
    return F.linear(x, cast(weight, x)) if mark is None else _Linear.apply(mark[0], x, weight, *mark[1])


def conv2d(
    x: Tensor, weight: Tensor, *, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """As `linear`, ``F.conv2d`` without bias, in one group."""
    mark = _mark(x, weight)
    if mark is None:
        return F.conv2d(x, cast(weight, x), None, stride, padding, dilation)
    return _Conv2d.apply(mark[0], (stride, padding, dilation), x, weight, *mark[1])


def cast(weight: Tensor, x: Tensor) -> Tensor:
    """The weight in ``x``'s dtype; under autocast torch does that itself, once for all uses."""
    return weight if _autocasts(x) else weight.to(x.dtype)


def _mark(x: Tensor, weight: Tensor) -> tuple["_Maker", tuple[Tensor, ...]] | None:
    """What ``x`` is made from, if a backward will want to know."""
    if torch.compiler.is_compiling() or _autocasts(x) or not (torch.is_grad_enabled() and weight.requires_grad):
        return None
    return getattr(x, _MARK, None)


def _autocasts(x: Tensor) -> bool:
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)  # it does not know that device


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


class _Conv2d(torch.autograd.Function):
    """As `_Linear`."""

    @staticmethod
    def forward(ctx: Any, maker: _Maker, geometry: Any, x: Tensor, weight: Tensor, *kept: Tensor) -> Tensor:
        maker.num_readers += 1
        ctx.maker, ctx.geometry = maker, geometry
        ctx.save_for_backward(weight, *kept)
        return F.conv2d(x, weight.to(x.dtype), None, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        d_x, d_weight, _ = torch.ops.aten.convolution_backward(
            gradient, ctx.maker.take(kept), weight.to(gradient.dtype), None, *ctx.geometry, False, [0, 0], 1,
            [ctx.needs_input_grad[2], True, False],
        )  # fmt: skip
        return None, None, d_x, d_weight.to(weight.dtype), *[None] * len(kept)
