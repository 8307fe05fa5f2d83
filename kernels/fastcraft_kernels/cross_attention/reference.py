"""Cross-attention in plain PyTorch, with its closed-form gradient; the sums over keys are exact, none is kept."""

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    """(N, S, H, D) -> (N, H, S, D) in float32, or float64 if it is."""
    return x.transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32))


def cross_attention_forward_reference(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Output (N, S, H, D) in ``q``'s dtype; k and v are (N, L, H, D) or (1, L, H, D)."""
    weights = (_wide(q) @ _wide(k).mT * scale).softmax(-1)
    return (weights @ _wide(v)).transpose(1, 2).to(q.dtype).contiguous()


def cross_attention_backward_reference(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ in ``q``'s dtype; dK and dV in float32 or wider and k's shape: of shared keys, the sum over the samples."""
    queries, keys, values, dout = _wide(q), _wide(k), _wide(v), _wide(dout)
    weights = (queries @ keys.mT * scale).softmax(-1)
    dweights = dout @ values.mT
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) * scale
    dq = (dscores @ keys).transpose(1, 2).to(q.dtype).contiguous()
    dk = (dscores.mT @ queries).transpose(1, 2).sum_to_size(k.shape)
    dv = (weights.mT @ dout).transpose(1, 2).sum_to_size(v.shape)
    return dq, dk.contiguous(), dv.contiguous()
