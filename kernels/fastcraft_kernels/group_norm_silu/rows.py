"""Channels-last views: every kernel sees a plane as ``(N, S, C)`` with contiguous channels."""

import math

from torch import Size, Tensor


def to_rows(x: Tensor) -> Tensor:
    """``(N, C, *spatial)`` of any strides -> contiguous ``(N, S, C)``: a view if it is channels-last, else a copy."""
    channels_last = x.movedim(1, -1)
    return channels_last.reshape(x.shape[0], math.prod(x.shape[2:]), x.shape[1]).contiguous()


def empty_rows(x: Tensor) -> Tensor:
    """Uninitialised ``(N, S, C)`` of ``x``'s dtype and device."""
    return x.new_empty(x.shape[0], math.prod(x.shape[2:]), x.shape[1])


def from_rows(rows: Tensor, shape: Size) -> Tensor:
    """``(N, S, C)`` -> a channels-last view ``(N, C, *spatial)`` of the given shape."""
    return rows.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
