"""Latents to pictures, with checkpointing of its own."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastcraft.records import RECOMPUTE, CheckpointPlan


def decode(vae: Any, latents: Tensor, plan: CheckpointPlan) -> Tensor:
    """Pictures of latents.

    Args:
        vae: a frozen diffusers ``AutoencoderKL``.
        latents: ``(B, C, h, w)`` float32, in the UNet's scale.
        plan: ``plan.decode`` says whether activations are kept or recomputed, ``plan.decode_micro_batch`` how many
            pictures are decoded at once.

    Returns:
        ``(B, 3, H, W)`` float32 in [0, 1]. The clamp kills the gradient of saturated values, as in TextCraftor.
    """

    def run(chunk: Tensor) -> Tensor:
        return vae.decode((chunk / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0].float()

    pictures = []
    for chunk in latents.split(plan.decode_micro_batch or len(latents)):
        if plan.decode == RECOMPUTE and torch.is_grad_enabled() and chunk.requires_grad:
            pictures.append(checkpoint(run, chunk, use_reentrant=False, preserve_rng_state=False))
        else:
            pictures.append(run(chunk))
    return (torch.cat(pictures) / 2 + 0.5).clamp(0, 1)
