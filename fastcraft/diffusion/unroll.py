"""The unrolled denoising loop: executes a `Trajectory` under a `CheckpointPlan`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcraft.diffusion.conditioning import Conditioning
from fastcraft.diffusion.network import Network
from fastcraft.diffusion.samplers.grid import Grid
from fastcraft.diffusion.treatments import BatchedSteps, carry_out
from fastcraft.memory.plan import KEEP, RECOMPUTE, CheckpointPlan
from fastcraft.records import Trajectory


def denoise(
    network: Network,
    latents: Tensor,
    conditioning: Conditioning,
    *,
    sampler: Grid,
    guidance_scale: float,
    trajectory: Trajectory,
    plan: CheckpointPlan,
    noises: Sequence[Tensor] | None = None,
    start: int = 0,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Run the steps ``start .. trajectory.num_steps - 1``.

    A step without gradient makes its prediction under ``no_grad``. The sampler's arithmetic always carries gradient, so
    a prediction in the middle of the trajectory reaches the image through the later steps.

    Args:
        network: frozen or trained.
        latents: ``(B, C, H, W)`` float32, standard normal for ``start`` = 0.
        conditioning: for B samples, or for 2B with guidance.
        sampler: see `Grid`.
        guidance_scale: at least 1.
        trajectory: which steps carry gradient, and how the run ends.
        plan: what each step with gradient keeps for backward; its length is that of ``trajectory.grad_steps``.
        noises: per step ``(B, C, H, W)``, for a stochastic sampler; drawn outside so that a recompute repeats them.
        start: first step to execute.
        on_step: called before every step, in a segment before the first of its steps; may raise to leave the loop.

    Returns:
        ``(B, C, H, W)`` float32: the latents after the last step, or its x0 estimate.

    Raises:
        ValueError: a plan that does not fit the trajectory, or that would lose the gradient of a trained network.
    """
    chain = _chain(network, latents, sampler, guidance_scale, trajectory, plan, noises, start)
    first = min(trajectory.grad_steps, default=trajectory.num_steps)
    if start < first:
        with torch.inference_mode():
            for index in range(start, first):
                if on_step is not None:
                    on_step()
                latents = chain.step(index, latents, conditioning)
        latents = latents.clone()  # autograd refuses to save a tensor made in inference mode
    for steps, together in _regions(trajectory, plan, max(start, first)):
        if on_step is not None:
            on_step()
        latents = chain.run(steps, latents, conditioning, recomputed=together)
    return latents


def _chain(
    network: Network, latents: Tensor, sampler: Grid, guidance_scale: float, trajectory: Trajectory,
    plan: CheckpointPlan, noises: Sequence[Tensor] | None, start: int,
) -> "_Chain":  # fmt: skip
    """The steps of one run, once plan, trajectory and network are known to fit each other."""
    if len(plan.steps) != len(trajectory.grad_steps):
        raise ValueError(f"denoise: plan has {len(plan.steps)} steps, trajectory {len(trajectory.grad_steps)}")
    if plan.batched and trajectory.input_grad:
        raise ValueError(f"denoise: plan.batched needs a trajectory with input_grad = False, got {plan.batched}")
    if plan.batched and is_trained(network):
        raise ValueError(
            f"denoise: plan.batched differentiates the text alone and would lose a trained network's gradient, got "
            f"{plan.batched}"
        )
    num_to_run = sum(index >= start for index in trajectory.grad_steps)
    return _Chain(
        network=network, sampler=sampler, guidance_scale=guidance_scale, trajectory=trajectory, noises=noises,
        treatments=dict(zip(trajectory.grad_steps, plan.steps, strict=True)),
        times=torch.tensor(sampler.timesteps, device=latents.device),
        batches=BatchedSteps(plan.batched, num_steps=num_to_run) if plan.batched else None,
    )  # fmt: skip


def is_trained(network: Network) -> bool:
    """Whether a weight of the network itself requires gradient."""
    return any(parameter.requires_grad for parameter in network.module.parameters())


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

    network: Network
    sampler: Grid
    guidance_scale: float
    trajectory: Trajectory
    noises: Sequence[Tensor] | None
    treatments: Mapping[int, str]
    times: Tensor
    batches: BatchedSteps | None

    def run(self, steps: range, latents: Tensor, conditioning: Conditioning, *, recomputed: bool) -> Tensor:
        """Several steps, run again in backward as a whole if ``recomputed``."""

        def chain(latents: Tensor, *flat: Tensor) -> Tensor:
            prepared = conditioning.unflatten(flat)
            for index in steps:
                latents = self.step(index, latents, prepared)
            return latents

        return carry_out(
            RECOMPUTE if recomputed else KEEP, chain, latents, *conditioning.flat(), module=self.network.module
        )

    def step(self, index: int, latents: Tensor, conditioning: Conditioning) -> Tensor:
        """The latents after step ``index``, or the x0 estimate where the run ends with one."""
        trajectory = self.trajectory

        def predict(indices: Sequence[int], latents: Tensor, *flat: Tensor) -> Tensor:
            return self._predict(indices, latents, conditioning.unflatten(flat))

        inputs = latents if trajectory.input_grad else latents.detach()
        if index not in self.treatments:
            with torch.no_grad():
                output = predict([index], inputs, *conditioning.flat())
        elif self.batches is not None:
            output = self._stop_gradients(index, self.batches.run(predict, index, inputs, *conditioning.flat()))
        else:
            output = carry_out(
                self.treatments[index], predict, [index], inputs, *conditioning.flat(), module=self.network.module
            )
            output = self._stop_gradients(index, output)
        if trajectory.predict_original and index == trajectory.num_steps - 1:
            return self.sampler.predict_original(index, latents, output, guidance_scale=self.guidance_scale)
        noise = None if self.noises is None else self.noises[index]
        return self.sampler.step(index, latents, output, guidance_scale=self.guidance_scale, noise=noise)

    def _predict(self, indices: Sequence[int], latents: Tensor, conditioning: Conditioning) -> Tensor:
        """Predictions of one step or, ``latents`` being those of several one below the other, of all of them."""
        guided, times = self.guidance_scale != 1, len(indices)
        if times == 1:
            return self.network.predict(latents, self.times[indices[0]], conditioning, guided=guided)
        num_samples = len(latents) // times
        time = torch.stack([self.times[index] for index in indices]).repeat_interleave(num_samples)
        conditioning = conditioning.repeat(times, num_samples=num_samples)
        output = self.network.predict(latents, time, conditioning, guided=guided)
        return output.unflatten(0, (-1, times, num_samples)).transpose(0, 1).flatten(0, 2)

    def _stop_gradients(self, index: int, output: Tensor) -> Tensor:
        """The same numbers, without gradient in unconditional rows and in samples that have not started, if so wished.

        Row by row in Python: a mask would have to be copied to the device in every step.
        """
        trajectory, num_copies = self.trajectory, 1 if self.guidance_scale == 1 else 2
        started = [index >= first for first in trajectory.row_starts] or [True] * (len(output) // num_copies)
        wanted = (trajectory.uncond_grad, True)[-num_copies:]
        keeps = [copy and sample for copy in wanted for sample in started]
        if all(keeps):
            return output
        rows = zip(output.split(1), keeps, strict=True)
        return torch.cat([row if keep else row.detach() for row, keep in rows])
