"""Latents to pictures, with a treatment of its own."""

from typing import Any

import torch
from torch import Tensor

from fastcraft.diffusion.treatments import carry_out
from fastcraft.memory.plan import KEEP, CheckpointPlan
from fastcraft.straight_through import clamp_straight_through


def decode(vae: Any, latents: Tensor, plan: CheckpointPlan, *, straight_through: bool = False) -> Tensor:
    """Pictures of latents.

    Args:
        vae: a frozen diffusers ``AutoencoderKL``.
        latents: ``(B, C, h, w)`` float32, in the UNet's scale.
        plan: ``plan.decode`` says what is kept for backward, ``plan.decode_micro_batch`` how many pictures are decoded
            at once.
        straight_through: saturated values keep their gradient; the pictures are the same. Changes the gradient.

    Returns:
        ``(B, 3, H, W)`` float32 in [0, 1]. The clamp kills the gradient of saturated values, as in TextCraftor, unless
        ``straight_through``.
    """

    def run(chunk: Tensor) -> Tensor:
        return vae.decode((chunk / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0].float()

    pictures = [
        carry_out(plan.decode if chunk.requires_grad else KEEP, run, chunk, module=vae)
        for chunk in latents.split(plan.decode_micro_batch or len(latents))
    ]
    images = torch.cat(pictures) / 2 + 0.5
    return clamp_straight_through(images) if straight_through else images.clamp(0, 1)
