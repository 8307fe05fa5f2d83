"""The start-up check of an accelerated UNet: same device, same weights, same shapes as the training that follows.

What is compared: an x0 estimate after steps without gradient, one after steps with gradient, and the gradient of the
latter to the text keys and values. The bound is measured, not guessed. Let d be eager's own distance from the same
computation in a wider dtype (float32 for 16 bits, float64 for float32). An accelerated step may be twice as far from
the truth as eager, so it may differ from eager by 3 d, and in any case by `LEAST_BOUND`. Distances are relative norms
of differences. The gradient of a single layer, in which errors average less, may differ by twice its own bound.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastcraft.diffusion.acceleration import AcceleratedUNet
from fastcraft.diffusion.conditioning import Conditioning
from fastcraft.errors import UserError
from fastcraft.families.image_model import ImageModel
from fastcraft.memory.plan import RECOMPUTE, CheckpointPlan
from fastcraft.records import PromptEmbeds, TextEmbeds, Trajectory
from fastcraft_kernels.backend import use_backend

TIMES_EAGER = 3.0
"""d, the distance of eager from the truth, and twice that of what is checked."""
LEAST_BOUND = 1e-4
"""Ten times what channels-last weights alone change in the bundled model in float32 on a CPU: other orders of sums."""
GENTLE_GUIDANCE = 1.5
"""Weight of the probe's guidance, which lies outside the UNet: a strong one makes a chain multiply rounding."""
TEXT_LENGTH = 77
"""Tokens of a prompt that is not cut into segments."""
_MAX_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A short run of the denoising loop on random text and noise.

    ``plan`` and ``trajectory`` are those of a training step, of which up to two steps with gradient are run;
    ``uncond_trained``: whether the empty prompt's embedding has gradient; ``seed``: of text and noise.
    """

    model: ImageModel
    batch_size: int
    plan: CheckpointPlan
    trajectory: Trajectory
    uncond_trained: bool = True
    seed: int = 0

    def run(self, unet: Any, rows: range | None = None) -> dict[str, Tensor]:
        """Name -> what is compared, on the device.

        Args:
            unet: in place of the model's; its weights may be of a wider dtype.
            rows: the samples that run; None = the whole batch.
        """
        rows = rows or range(self.batch_size)
        guidance = 1.0 if self.model.guidance_scale == 1 else GENTLE_GUIDANCE
        network = self.model.network.using(unet)
        model = replace(self.model, network=network, guidance_scale=guidance, on_step=None)
        depth = min(_MAX_STEPS, len(self.plan.steps))
        num_free = self.trajectory.num_steps - len(self.plan.steps)
        frozen = min(1, num_free)
        last = self.trajectory.num_steps - num_free // 3  # elsewhere x0 hangs on the prediction too much or too little
        first, options = last - depth, replace(self.trajectory, predict_original=True, row_starts=())
        latents, noises = model.noise([self.seed * self.batch_size + row for row in rows])
        conditioning = self._conditioning(unet.dtype, rows)
        results = {}
        if frozen:
            ended, text = replace(options, num_steps=first, grad_steps=()), conditioning.detach()
            results["prefix"] = model.denoise(
                latents, text, trajectory=ended, plan=CheckpointPlan(steps=()), noises=noises, start=first - frozen
            ).clone()
            latents = model.prefix(latents, text, num_steps=first, noises=noises, start=first - frozen)
        end = model.denoise(
            latents,
            conditioning,
            trajectory=replace(options, num_steps=last, grad_steps=tuple(range(first, last))),
            plan=CheckpointPlan(steps=self.plan.steps[-depth:], segments=(depth,) if self.plan.segments else ()),
            noises=noises,
            start=first,
        )
        results["step"] = end.detach()
        cotangents = torch.randn(self.batch_size, *end.shape[1:], generator=torch.Generator().manual_seed(1))
        cotangent = cotangents[rows.start : rows.stop].to(end)
        wanted = [tensor for tensor in conditioning.flat() if tensor.requires_grad]
        grads = torch.autograd.grad((end * cotangent).sum(), wanted)
        return results | {f"gradient {number}": grad for number, grad in enumerate(grads)}

    def _conditioning(self, dtype: torch.dtype, rows: range) -> Conditioning:
        """Leaves; rounded as in the model's own dtype, whatever dtype they are given in."""
        generator, width = (
            torch.Generator().manual_seed(self.seed),
            self.model.network.module.config.cross_attention_dim,
        )
        uncond, cond = (
            torch.randn(n, TEXT_LENGTH, width, generator=generator).to(self.model.device) for n in (1, self.batch_size)
        )
        cond = cond[rows.start : rows.stop].requires_grad_()
        guided = self.model.guidance_scale != 1
        empty = TextEmbeds(sequence=uncond.requires_grad_(self.uncond_trained)) if guided else None
        projected = self.model.condition(PromptEmbeds(cond=TextEmbeds(sequence=cond), uncond=empty))
        return projected.unflatten(
            [tensor.detach().to(dtype).requires_grad_(tensor.requires_grad) for tensor in projected.flat()]
        )


def accelerate(
    probe: Probe, *, compile: str, cuda_graphs: str, make: Callable[..., AcceleratedUNet] = AcceleratedUNet
) -> tuple[AcceleratedUNet, str]:
    """The UNet of ``probe.model``, accelerated and checked against itself as it was.

    Args:
        probe: at the batch size of training: what is checked is what will run.
        compile: see `fastcraft.recipe.KernelsConfig`.
        cuda_graphs: likewise.
        make: the accelerated UNet's class.

    Returns:
        the UNet, and a line for the person at the terminal.

    Raises:
        UserError: it cannot be compiled or recorded here, or gives other numbers than eager.
    """
    switches = {"compile": compile, "cuda_graphs": cuda_graphs}
    named = " and ".join(f"{key} = {value!r}" for key, value in switches.items() if value != "none")
    unet, began = probe.model.network.module, time.perf_counter()
    eager, eager_and_truth = probe.run(unet), _eager_and_truth(probe)
    try:
        fast = make(unet, **switches)
        with fast.learning():
            replace(probe, seed=1).run(fast)
        results = probe.run(fast)  # on other numbers: none may have stayed behind in code or graphs
    except (torch.OutOfMemoryError, UserError):
        raise
    except Exception as failure:  # compilers and drivers raise whatever they like
        reason = (str(failure).strip() or type(failure).__name__).splitlines()[0]
        raise UserError(f"{named}: cannot be had here: {type(failure).__name__}: {reason}") from failure
    worst = {}
    for kind, names in _kinds(eager).items():
        parts = [(names, 1), *(([name], 2) for name in names if len(names) > 1)]
        worst[kind] = 0.0
        for part, times in parts:
            one, other, eager_again, truth = (_joined(run, part) for run in (results, eager, *eager_and_truth))
            difference = distance(one, other)
            allowed = times * max(TIMES_EAGER * distance(eager_again, truth), LEAST_BOUND)
            if not difference <= allowed:
                raise UserError(
                    f"{named}: refused, the {kind} differs from eager's by {difference:.2g} of its norm on "
                    f"{unet.device}, more than {allowed:.2g}"
                )
            worst[kind] = max(worst[kind], difference)
    differences = ", ".join(f"{kind} {error:.1e}" for kind, error in worst.items())
    return fast, f"{named}: ready after {time.perf_counter() - began:.0f} s; differs from eager by: {differences}"


def distance(one: Tensor, other: Tensor) -> float:
    """Relative norm of the difference; NaN where either is not finite."""
    one, other = one.double(), other.double()
    return float((one - other).norm() / other.norm().clamp_min(torch.finfo(torch.float32).tiny))


def _eager_and_truth(probe: Probe) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The probe by the UNet and by a copy in a wider dtype, on plain PyTorch.

    The samples are those that are checked, since some are harder than others; half of them at a time, so that the wider
    copy takes no more memory. A name has the numbers of both halves, one after the other.
    """
    unet, steps = probe.model.network.module, (RECOMPUTE,) * len(probe.plan.steps)
    probe = replace(probe, plan=CheckpointPlan(steps=steps))
    middle = probe.batch_size // 2
    halves = [range(middle), range(middle, probe.batch_size)] if middle else [range(1)]
    wide = nn.Module.to(copy.deepcopy(unet), torch.float64 if unet.dtype == torch.float32 else torch.float32)
    with use_backend("reference"):  # the kernels know no float64
        truth = [probe.run(wide, rows) for rows in halves]
    eager = [probe.run(unet, rows) for rows in halves]
    return _one_after_the_other(eager), _one_after_the_other(truth)


def _one_after_the_other(runs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([run[name].flatten() for run in runs]) for name in runs[0]}


def _kinds(results: dict[str, Tensor]) -> dict[str, list[str]]:
    """Names by what they are: prefix, step, gradient."""
    kinds: dict[str, list[str]] = {}
    for name in results:
        kinds.setdefault(name.partition(" ")[0], []).append(name)
    return kinds


def _joined(results: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([results[name].double().flatten() for name in names])
