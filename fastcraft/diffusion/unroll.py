"""The unrolled denoising loop: executes a `Trajectory` under a `CheckpointPlan`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcraft.diffusion.treatments import BatchedSteps, carry_out
from fastcraft.records import KEEP, RECOMPUTE, CheckpointPlan, TextKV, Trajectory


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
        timestep: ``()``, or ``(B,)`` of one's own for each row, int64 on the UNet's device.
        text_kv: 2B rows, unconditional first; B rows when ``guidance_scale`` is 1.
        guidance_scale: at least 1.
        uncond_grad: False stops the gradient of the unconditional branch (changes the gradient).

    Returns:
        ``(B, C, H, W)`` float32.
    """
    guided = guidance_scale != 1
    inputs = torch.cat([latents, latents]) if guided else latents
    if guided and timestep.ndim:
        timestep = torch.cat([timestep, timestep])
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
        on_step: called before every step, in a segment before the first of its steps; may raise to leave the loop.

    Returns:
        ``(B, C, H, W)`` float32: the latents after the last step, or its x0 estimate.
    """
    if len(plan.steps) != len(trajectory.grad_steps):
        raise ValueError(f"denoise: plan has {len(plan.steps)} steps, trajectory {len(trajectory.grad_steps)}")
    if plan.batched and trajectory.input_grad:
        raise ValueError(f"denoise: plan.batched needs a trajectory with input_grad = False, got {plan.batched}")
    chain = _Chain(
        unet=unet, sampler=sampler, guidance_scale=guidance_scale, trajectory=trajectory, noises=noises,
        treatments=dict(zip(trajectory.grad_steps, plan.steps, strict=True)),
        timesteps=torch.tensor(sampler.timesteps, device=latents.device),
        batches=BatchedSteps(plan.batched, num_steps=len(plan.steps)) if plan.batched else None,
    )  # fmt: skip
    first = min(trajectory.grad_steps, default=trajectory.num_steps)
    if start < first:
        with torch.inference_mode():
            for index in range(start, first):
                if on_step is not None:
                    on_step()
                latents = chain.step(index, latents, prefix_kv)
        latents = latents.clone()  # autograd refuses to save a tensor made in inference mode
    for steps, together in _regions(trajectory, plan, max(start, first)):
        if on_step is not None:
            on_step()
        latents = chain.run(steps, latents, text_kv, recomputed=together)
    return latents


def _regions(trajectory: Trajectory, plan: CheckpointPlan, start: int) -> Iterator[tuple[range, bool]]:
    """Steps from ``start`` on, grouped: (steps, whether they are recomputed together)."""
    position, index = 0, start
    for length in plan.segments:
        group = trajectory.grad_steps[position : position + length]
        position += length
        for between in range(index, group[0]):
            yield range(between, between + 1), False
        index = group[-1] + 1
        yield range(group[0], index), True
    for rest in range(index, trajectory.num_steps):
        yield range(rest, rest + 1), False


@dataclass(frozen=True, kw_only=True)
class _Chain:
    """What all steps of one run share; ``treatments`` has the steps with gradient. Names as in `denoise`."""

    unet: Any
    sampler: Any
    guidance_scale: float
    trajectory: Trajectory
    noises: Sequence[Tensor] | None
    treatments: Mapping[int, str]
    timesteps: Tensor
    batches: BatchedSteps | None

    def run(self, steps: range, latents: Tensor, text_kv: TextKV, *, recomputed: bool) -> Tensor:
        """Several steps, run again in backward as a whole if ``recomputed``."""

        def chain(latents: Tensor, *flat: Tensor) -> Tensor:
            kv = text_kv.unflatten(flat)
            for index in steps:
                latents = self.step(index, latents, kv)
            return latents

        return carry_out(RECOMPUTE if recomputed else KEEP, chain, latents, *text_kv.flat(), module=self.unet)

    def step(self, index: int, latents: Tensor, text_kv: TextKV) -> Tensor:
        """The latents after step ``index``, or the x0 estimate where the run ends with one."""
        trajectory = self.trajectory

        def predict(indices: Sequence[int], latents: Tensor, *flat: Tensor) -> Tensor:
            return self._predict(indices, latents, text_kv.unflatten(flat))

        inputs = latents if trajectory.input_grad else latents.detach()
        if index not in self.treatments:
            with torch.no_grad():
                output = predict([index], inputs, *text_kv.flat())
        elif self.batches is not None:
            output = self.batches.run(predict, index, inputs, *text_kv.flat())
        else:
            output = carry_out(self.treatments[index], predict, [index], inputs, *text_kv.flat(), module=self.unet)
        if trajectory.row_starts and index in self.treatments and index < max(trajectory.row_starts):
            started = torch.tensor([index >= row for row in trajectory.row_starts], device=output.device)
            output = torch.where(started[:, None, None, None], output, output.detach())
        if trajectory.predict_original and index == trajectory.num_steps - 1:
            return self.sampler.predict_original(index, latents, output)
        return self.sampler.step(index, latents, output, None if self.noises is None else self.noises[index])

    def _predict(self, indices: Sequence[int], latents: Tensor, text_kv: TextKV) -> Tensor:
        """Predictions of one step or, ``latents`` being those of several one below the other, of all of them."""
        timestep = self.timesteps[indices[0]]
        if (times := len(indices)) > 1:
            num_samples = len(latents) // times
            timestep = torch.stack([self.timesteps[index] for index in indices]).repeat_interleave(num_samples)
            text_kv = text_kv.repeat(times, num_samples=num_samples)
        return predict_noise(
            self.unet, latents, timestep, text_kv, guidance_scale=self.guidance_scale,
            uncond_grad=self.trajectory.uncond_grad,
        )  # fmt: skip
