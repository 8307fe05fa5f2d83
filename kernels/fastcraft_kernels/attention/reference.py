"""Self-attention in plain PyTorch, with its closed-form gradient, some queries at a time.

``softmax(q k^T * scale) v`` of Vaswani et al. 2017 (arXiv:1706.03762, section 3.2.1); the gradient from the output and
the log-sum-exp is that of FlashAttention (arXiv:2205.14135, appendix B.2).
"""

import torch
from torch import Tensor

ROWS = 1024  # queries at a time, so that the scores of 4096 tokens and 8 heads stay below 150 MB a sample


def _wide(x: Tensor) -> Tensor:
    """(N, S, H, D) -> (N, H, S, D) in float32, or float64 if it is."""
    return x.transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32))


def attention_forward_reference(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Output (N, S, H, D) in ``q``'s dtype and natural-log log-sum-exp (N, H, S), float32 or wider."""
    keys, values = _wide(k), _wide(v)
    outs, lses = [], []
    for rows in _wide(q).split(ROWS, dim=2):
        scores = rows @ keys.mT * scale  # (N, H, rows, S)
        lse = scores.logsumexp(-1)
        outs.append((scores - lse[..., None]).exp() @ values)
        lses.append(lse)
    return torch.cat(outs, 2).transpose(1, 2).to(q.dtype).contiguous(), torch.cat(lses, 2)


def attention_backward_reference(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV, contiguous (N, S, H, D)."""
    keys, values = _wide(k), _wide(v)
    dk, dv, dqs = torch.zeros_like(keys), torch.zeros_like(values), []
    pieces = zip(*(x.split(ROWS, dim=2) for x in (_wide(q), _wide(dout), _wide(out), lse)), strict=True)
    for q_rows, dout_rows, out_rows, lse_rows in pieces:
        weights = (q_rows @ keys.mT * scale - lse_rows[..., None]).exp()
        delta = (dout_rows * out_rows).sum(-1, keepdim=True)
        dscores = weights * (dout_rows @ values.mT - delta) * scale
        dqs.append(dscores @ keys)
        dk += dscores.mT @ q_rows
        dv += weights.mT @ dout_rows
    dq, dk, dv = (x.transpose(1, 2).to(q.dtype).contiguous() for x in (torch.cat(dqs, 2), dk, dv))
    return dq, dk, dv
