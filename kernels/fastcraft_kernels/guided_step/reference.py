"""Guidance and a sampler's update in plain PyTorch, with the backward pass in closed form.

Both are linear, so the whole step is ``x' = a x + b_uncond m_u + b_cond m_c + c z`` with four numbers; backward needs
the numbers and nothing else.
"""

import torch
from torch import Tensor


def guided_step_forward(
    latents: Tensor, output: Tensor, noise: Tensor | None, *, a: float, b_uncond: float, b_cond: float, c: float
) -> Tensor:
    """``a latents + b_uncond output[:B] + b_cond output[B:] + c noise``, ``(B, C, H, W)`` in the dtype of ``latents``.

    ``output`` of B rows instead of 2B is the unguided prediction; it is weighted by ``b_cond``.
    """
    batch = len(latents)
    result = a * latents + b_cond * output[-batch:].to(latents.dtype)
    if len(output) == 2 * batch:
        result = result + b_uncond * output[:batch].to(latents.dtype)
    return result if noise is None else result + c * noise


def guided_step_backward(
    dy: Tensor, *, a: float, b_uncond: float, b_cond: float, guided: bool, output_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients to the latents ``(B, C, H, W)`` and to the output ``(2B, C, H, W)`` or ``(B, C, H, W)``."""
    rows = [b_uncond * dy, b_cond * dy] if guided else [b_cond * dy]
    return a * dy, torch.cat(rows).to(output_dtype)
