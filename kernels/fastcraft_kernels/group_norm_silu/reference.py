"""Plain PyTorch: forward and closed-form backward, sums in float32 (float64 for float64 input)."""

import torch
from torch import Tensor

from fastcraft_kernels.group_norm_silu.rows import from_rows, to_rows


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _grouped(rows: Tensor, num_groups: int) -> Tensor:
    return rows.unflatten(-1, (num_groups, -1))  # (N, S, G, C / G)


def _expand(stat: Tensor, rows: Tensor) -> Tensor:
    """``(N, G)`` -> ``(N, 1, C)``."""
    return stat.repeat_interleave(rows.shape[-1] // stat.shape[-1], dim=-1).unsqueeze(1)


def group_norm_silu_forward(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, residual: Tensor | None, num_groups: int,
    eps: float, silu: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns ``total`` (``None`` without a residual), ``out``, and the groups' ``mean`` and ``rstd`` ``(N, G)``."""
    h = _wide(to_rows(x))  # (N, S, C)
    if shift is not None:
        h = h + _wide(shift).unsqueeze(1)
    total = None
    if residual is not None:
        rounded = (h + _wide(to_rows(residual))).to(x.dtype)
        total, h = from_rows(rounded, x.shape), _wide(rounded)
    var, mean = torch.var_mean(_grouped(h, num_groups), dim=(1, 3), correction=0)  # (N, G)
    rstd = (var + eps).rsqrt()
    z = (h - _expand(mean, h)) * _expand(rstd, h) * _wide(weight) + _wide(bias)
    out = torch.nn.functional.silu(z) if silu else z
    return total, from_rows(out.to(x.dtype), x.shape), mean, rstd


def group_norm_silu_backward(
    d_out: Tensor, d_total: Tensor | None, h: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None,
    mean: Tensor, rstd: Tensor, silu: bool, affine_grad: bool, shift_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of the summed input, ``weight``, ``bias`` and ``shift``; the last three wide, where they are wanted.

    ``h`` is what was normalised (before ``shift``, where that is given).
    """
    rows, dy = _wide(to_rows(h)), _wide(to_rows(d_out))
    if shift is not None:
        rows = rows + _wide(shift).unsqueeze(1)
    scale = _expand(rstd, rows)
    normal = (rows - _expand(mean, rows)) * scale
    if silu:
        z = normal * _wide(weight) + _wide(bias)
        sigmoid = torch.sigmoid(z)
        dy = dy * sigmoid * (1 + z * (1 - sigmoid))
    d_weight = (dy * normal).sum(dim=(0, 1)) if affine_grad else None
    d_bias = dy.sum(dim=(0, 1)) if affine_grad else None
    dn = dy * _wide(weight)
    mean_dn = _grouped(dn, mean.shape[-1]).mean(dim=(1, 3))
    mean_dn_normal = _grouped(dn * normal, mean.shape[-1]).mean(dim=(1, 3))
    dx = scale * (dn - _expand(mean_dn, dn) - normal * _expand(mean_dn_normal, dn))
    if d_total is not None:
        dx = dx + _wide(to_rows(d_total))
    return from_rows(dx.to(h.dtype), h.shape), d_weight, d_bias, dx.sum(dim=1) if shift_grad else None
