"""Plain PyTorch: forward and closed-form backward, in float32 (float64 for float64 input)."""

import math

import torch
from torch import Tensor


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    value, gate = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return value, gate


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def geglu_forward(x: Tensor) -> Tensor:
    """``(..., 2F)`` -> ``(..., F)``, contiguous."""
    value, gate = _halves(x)
    return (value * gate * _normal_cdf(gate)).to(x.dtype).contiguous()


def geglu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of ``x``, contiguous."""
    value, gate = _halves(x)
    wide = dy.to(value.dtype)
    cdf = _normal_cdf(gate)
    density = torch.exp(-0.5 * gate * gate) / math.sqrt(2 * math.pi)
    dx = torch.cat((wide * gate * cdf, wide * value * (cdf + gate * density)), dim=-1)
    return dx.to(x.dtype).contiguous()
