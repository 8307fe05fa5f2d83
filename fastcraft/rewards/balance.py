"""Rewards weighed by their pull on the picture instead of their units.

Shape letters: B images, H and W pixels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def balance(images: Tensor, leaf: Tensor, scores: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """A total to which reward i contributes a gradient at the images of norm ``|weight_i| / sum_j |weight_j|``.

    The norm is that of each image's gradient, root mean square over the B images of this call; the direction is that
    of the reward, or its opposite under a negative weight. A reward without any gradient contributes none. The
    divisors carry no gradient themselves.

    Args:
        images: ``(B, 3, H, W)``; the total's gradient goes to them.
        leaf: ``(B, 3, H, W)``, the same numbers, detached and requiring gradient; what the scores were computed from.
        scores: ``(B,)`` each, differentiable in ``leaf``. Their graphs are used up.
        weights: one for each score, not 0.

    Returns:
        ``(B,)`` float32: the sum of ``share_i / norm_i * score_i``. Saved for backward: its gradient at the images,
        so that backward does not go through the rewards a second time.
    """
    total = torch.zeros(images.shape[0], dtype=torch.float32, device=images.device)
    gradient = torch.zeros_like(leaf)
    size = sum(abs(weight) for weight in weights)
    for i, (score, weight) in enumerate(zip(scores, weights, strict=True)):
        # Rewards on one tower share its graph, so it is kept until the last of them has gone through.
        (pull,) = torch.autograd.grad(score.sum(), leaf, retain_graph=i + 1 < len(scores))
        norm = pull.float().flatten(1).norm(dim=1).square().mean().sqrt()
        factor = torch.where(norm == 0, 0.0, weight / size / norm)
        total = total + factor * score.detach()
        gradient = gradient + factor * pull
    return _Surrogate.apply(images, total, gradient)


class _Surrogate(torch.autograd.Function):
    """``total``, with ``gradient`` as its derivative by ``images``."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, total: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = images.dtype
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (outer[0].view(-1, 1, 1, 1) * gradient).to(ctx.dtype), None, None
