"""Plain PyTorch: forward and closed-form backward, sums in float32 (float64 for float64 input)."""

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Returns ``total`` (``None`` without a residual), ``out``, and ``mean`` and ``rstd`` of the rows ``(...)``."""
    total = None
    h = _wide(x)
    if residual is not None:
        total = (h + _wide(residual)).to(x.dtype).contiguous()
        h = _wide(total)
    var, mean = torch.var_mean(h, dim=-1, correction=0)
    rstd = (var + eps).rsqrt()
    out = (h - mean.unsqueeze(-1)) * rstd.unsqueeze(-1) * _wide(weight) + _wide(bias)
    return total, out.to(x.dtype).contiguous(), mean.contiguous(), rstd.contiguous()


def layer_norm_backward(
    d_out: Tensor, d_total: Tensor | None, h: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, affine_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the summed input, and of ``weight`` and ``bias`` in the wide dtype where they are wanted."""
    dy = _wide(d_out)
    normal = (_wide(h) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    dn = dy * _wide(weight)
    inner = dn - dn.mean(-1, keepdim=True) - normal * (dn * normal).mean(-1, keepdim=True)
    dx = inner * rstd.unsqueeze(-1)
    if d_total is not None:
        dx = dx + _wide(d_total)
    dx = dx.to(h.dtype).contiguous()
    if not affine_grad:
        return dx, None, None
    width = h.shape[-1]
    return dx, (dy * normal).reshape(-1, width).sum(0), dy.reshape(-1, width).sum(0)
