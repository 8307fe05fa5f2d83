"""Guidance and DDIM update in plain PyTorch, with the backward pass in closed form.

Both are linear, so the whole step is ``next = a x + b_u u + b_c c + s n`` with four numbers; backward needs the numbers
and nothing else.
"""

import torch
from torch import Tensor


def step_coefficients(
    alpha_cumprod: float, previous_alpha_cumprod: float, *, guidance_scale: float, eta: float, prediction_type: str
) -> tuple[float, float, float, float]:
    """``(a, b_u, b_c, s)`` of a step from signal level ``alpha_cumprod`` to ``previous_alpha_cumprod``.

    The update is Song et al. 2020 (arXiv:2010.02502, Eq. 12), the guidance Ho and Salimans 2022 (arXiv:2207.12598);
    for a v-prediction, x0 and epsilon are those of Salimans and Ho 2022 (arXiv:2202.00512, appendix D).
    """
    signal, noise = alpha_cumprod**0.5, (1 - alpha_cumprod) ** 0.5
    variance = (1 - previous_alpha_cumprod) / (1 - alpha_cumprod) * (1 - alpha_cumprod / previous_alpha_cumprod)
    sigma = eta * variance**0.5
    of_original = previous_alpha_cumprod**0.5
    of_epsilon = max(1 - previous_alpha_cumprod - sigma**2, 0.0) ** 0.5  # rounding may leave less than 0
    if prediction_type == "epsilon":
        of_latents = of_original / signal
        of_output = of_epsilon - of_latents * noise
    else:
        of_latents = of_original * signal + of_epsilon * noise
        of_output = of_epsilon * signal - of_original * noise
    return of_latents, (1 - guidance_scale) * of_output, guidance_scale * of_output, sigma


def guided_step_forward(
    latents: Tensor, output: Tensor, noise: Tensor | None, *, a: float, b_uncond: float, b_cond: float, s: float
) -> Tensor:
    """``a latents + b_uncond output[:B] + b_cond output[B:] + s noise``, ``(B, C, H, W)`` in the dtype of ``latents``.

    ``output`` of B rows instead of 2B is the unguided prediction; it is weighted by ``b_cond``.
    """
    batch = len(latents)
    result = a * latents + b_cond * output[-batch:].to(latents.dtype)
    if len(output) == 2 * batch:
        result = result + b_uncond * output[:batch].to(latents.dtype)
    return result if noise is None else result + s * noise


def guided_step_backward(
    dy: Tensor, *, a: float, b_uncond: float, b_cond: float, guided: bool, output_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients to the latents ``(B, C, H, W)`` and to the output ``(2B, C, H, W)`` or ``(B, C, H, W)``."""
    rows = [b_uncond * dy, b_cond * dy] if guided else [b_cond * dy]
    return a * dy, torch.cat(rows).to(output_dtype)
