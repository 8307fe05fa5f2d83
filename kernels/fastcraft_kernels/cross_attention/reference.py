"""Cross-attention in plain PyTorch, with its closed-form gradient; the sums over keys are exact, none is kept."""

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    """(N, S, H, D) -> (N, H, S, D) in float32, or float64 if it is."""
    return x.transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32))


def _pieces(num_shared: int, queries: list[Tensor], keys: list[Tensor]) -> list[list[Tensor]]:
    """``queries`` and ``keys``, both (rows, ...), cut so that every sample of a piece has a row of keys of its own.

    Samples that share their keys become one sample with all their queries, which needs no copy of either.
    """
    if num_shared == 1:
        return [[*queries, *keys]]
    first = [*(x[:num_shared].flatten(0, 1)[None] for x in queries), *(x[:1] for x in keys)]
    rest = [*(x[num_shared:] for x in queries), *(x[1:] for x in keys)]
    return [first, rest] if rest[0].shape[0] else [first]


def cross_attention_forward_reference(q: Tensor, k: Tensor, v: Tensor, *, scale: float, num_shared: int = 1) -> Tensor:
    """Output (N, S, H, D) in ``q``'s dtype; k and v are (N - num_shared + 1, L, H, D)."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (_wide(q) @ _wide(k).mT * scale).softmax(-1)
        return (weights @ _wide(v)).transpose(1, 2).to(q.dtype)

    parts = [attend(*piece).reshape(-1, *q.shape[1:]) for piece in _pieces(num_shared, [q], [k, v])]
    return torch.cat(parts).contiguous()


def cross_attention_backward_reference(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *, scale: float, num_shared: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ in ``q``'s dtype; dK and dV in float32 or wider and k's shape: of shared keys, the sum over the samples."""

    def differentiate(dout: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys, values, dout = _wide(q), _wide(k), _wide(v), _wide(dout)
        weights = (queries @ keys.mT * scale).softmax(-1)
        dweights = dout @ values.mT
        dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) * scale
        dq = (dscores @ keys).transpose(1, 2).to(q.dtype)
        return dq, (dscores.mT @ queries).transpose(1, 2), (weights.mT @ dout).transpose(1, 2)

    parts = [differentiate(*piece) for piece in _pieces(num_shared, [dout, q], [k, v])]
    dq, dk, dv = (
        torch.cat([x.reshape(-1, *like.shape[1:]) for x in pieces])
        for pieces, like in zip(zip(*parts, strict=True), (q, k, v), strict=True)
    )
    return dq.contiguous(), dk.contiguous(), dv.contiguous()
