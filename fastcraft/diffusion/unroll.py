"""The unrolled denoising loop: executes a `Trajectory` under a `CheckpointPlan`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastcraft.records import RECOMPUTE, CheckpointPlan, TextKV, Trajectory


def predict_noise(
    unet: Any,
    latents: Tensor,
    timestep: Tensor,
    text_kv: TextKV,
    *,
    guidance_scale: float,
    uncond_grad: bool = True,
) -> Tensor:
    """The guided prediction, ``e_u + guidance_scale (e_c - e_u)`` (Ho and Salimans 2022, arXiv:2207.12598).

    Args:
        unet: prepared by `use_text_kv`.
        latents: ``(B, C, H, W)`` float32.
        timestep: ``()`` int64 on the UNet's device.
        text_kv: 2B rows, unconditional first; B rows when ``guidance_scale`` is 1.
        guidance_scale: at least 1.
        uncond_grad: False stops the gradient of the unconditional branch (changes the gradient).

    Returns:
        ``(B, C, H, W)`` float32.
    """
    guided = guidance_scale != 1
    inputs = torch.cat([latents, latents]) if guided else latents
    output = unet(
        inputs.to(unet.dtype),
        timestep,
        encoder_hidden_states=None,
        cross_attention_kwargs={"text_kv": text_kv},
        return_dict=False,
    )[0].float()
    if not guided:
        return output
    uncond, cond = output.chunk(2)
    if not uncond_grad:
        uncond = uncond.detach()
    return uncond + guidance_scale * (cond - uncond)


def denoise(
    unet: Any,
    latents: Tensor,
    *,
    sampler: Any,
    text_kv: TextKV,
    prefix_kv: TextKV,
    guidance_scale: float,
    trajectory: Trajectory,
    plan: CheckpointPlan,
    noises: Sequence[Tensor] | None = None,
    start: int = 0,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Run the steps ``start .. trajectory.num_steps - 1``.

    Steps before the first one with gradient are conditioned by ``prefix_kv``, later ones by ``text_kv``; a step without
    gradient makes its prediction under ``no_grad``. The sampler's arithmetic always carries gradient, so a prediction
    in the middle of the trajectory reaches the image through the later steps.

    Args:
        unet: frozen, prepared by `use_text_kv`.
        latents: ``(B, C, H, W)`` float32, standard normal for ``start`` = 0.
        sampler: an entry of `SAMPLERS`.
        text_kv: what the trained encoder gives, with gradient.
        prefix_kv: what conditions the prefix.
        guidance_scale: at least 1.
        trajectory: which steps carry gradient, and how the run ends.
        plan: what each step with gradient keeps for backward; its length is that of ``trajectory.grad_steps``.
        noises: per step ``(B, C, H, W)``, for a stochastic sampler; drawn outside so that a recompute repeats them.
        start: first step to execute.
        on_step: called before every step; may raise to leave the loop.

    Returns:
        ``(B, C, H, W)`` float32: the latents after the last step, or its x0 estimate.
    """
    if len(plan.steps) != len(trajectory.grad_steps):
        raise ValueError(f"denoise: plan has {len(plan.steps)} steps, trajectory {len(trajectory.grad_steps)}")
    treatments = dict(zip(trajectory.grad_steps, plan.steps, strict=True))
    first = min(trajectory.grad_steps, default=trajectory.num_steps)
    timesteps = torch.tensor(sampler.timesteps, device=latents.device)

    def predict(index: int, latents: Tensor, *flat: Tensor) -> Tensor:
        source = text_kv if index >= first else prefix_kv
        kv = TextKV(layers=dict(zip(source.layers, zip(flat[::2], flat[1::2], strict=True), strict=True)))
        return predict_noise(
            unet, latents, timesteps[index], kv, guidance_scale=guidance_scale, uncond_grad=trajectory.uncond_grad
        )

    for index in range(start, trajectory.num_steps):
        if on_step is not None:
            on_step()
        inputs = latents if trajectory.input_grad else latents.detach()
        flat = (text_kv if index >= first else prefix_kv).flat()
        if index not in treatments:
            with torch.no_grad():
                output = predict(index, inputs, *flat)
        elif treatments[index] == RECOMPUTE:
            output = checkpoint(predict, index, inputs, *flat, use_reentrant=False, preserve_rng_state=False)
        else:
            output = predict(index, inputs, *flat)
        if trajectory.row_starts and index in treatments and index < max(trajectory.row_starts):
            started = torch.tensor([index >= row for row in trajectory.row_starts], device=output.device)
            output = torch.where(started[:, None, None, None], output, output.detach())
        if trajectory.predict_original and index == trajectory.num_steps - 1:
            return sampler.predict_original(index, latents, output)
        latents = sampler.step(index, latents, output, None if noises is None else noises[index])
    return latents
