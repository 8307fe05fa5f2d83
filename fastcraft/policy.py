"""From a recipe to what its steps keep, and to what its UNet runs as: the two must fit each other."""

import dataclasses
import os
from collections.abc import Callable, Iterable

import torch

from fastcraft.diffusion.acceleration import COMPILED_TREATMENTS, refuse_acceleration
from fastcraft.families.image_model import ImageModel
from fastcraft.families.parity import Probe, accelerate
from fastcraft.forecast.auto import planner_of
from fastcraft.forecast.networks import Networks
from fastcraft.forecast.planner import AutoPlan, Planner
from fastcraft.memory.plan import CheckpointPlan
from fastcraft.memory.policies import plan_maker
from fastcraft.recipe import Recipe
from fastcraft.records import Trajectory


def policy_of(
    recipe: Recipe, networks: Networks | None, device: torch.device
) -> tuple[Callable[[int], CheckpointPlan], AutoPlan | None]:
    """The recipe's policy: from the number of steps with gradient to the plan; and the planner behind ``auto``.

    Args:
        recipe: of the run.
        networks: what ``auto`` weighs; not needed for other policies.
        device: where it trains.

    Raises:
        UserError: a policy that is not there or cannot be had here, or a budget that nothing meets.
    """
    depth, memory = recipe.objective.backprop_steps, recipe.memory
    if memory.policy == "auto" and networks is not None:
        treatments = COMPILED_TREATMENTS.get(recipe.kernels.compile, ())
        planner = run_planner(recipe, networks, device, treatments=treatments)
        auto = AutoPlan(planner, batch_size=recipe.train.batch_size)
        auto.choose(depth)
        return auto.plan, auto
    make = plan_maker(
        memory.policy, backprop_steps=depth, decode_micro_batch=memory.decode_micro_batch, device_type=device.type,
        input_grad=recipe.objective.input_grad,
    )  # fmt: skip
    refuse_switches(recipe, device, make(depth))
    return make, None


def run_planner(recipe: Recipe, networks: Networks, device: torch.device, *, treatments: Iterable[str] = ()) -> Planner:
    """A planner for a recipe's run on a device; ``treatments`` are what it can weigh, none = all there are."""
    return planner_of(
        networks,
        device=device,
        guided=recipe.sampler.guidance_scale != 1,
        uncond_trained=recipe.text.uncond_encoder == "trained",
        num_inference_steps=recipe.sampler.num_inference_steps,
        input_grad=recipe.objective.input_grad,
        budget_gib=recipe.memory.budget_gib,
        decode_micro_batch=recipe.memory.decode_micro_batch,
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        treatments=treatments,
        batches=recipe.kernels.compile not in COMPILED_TREATMENTS,  # which are of one size
        unet_copies=int(recipe.kernels.compile in ("prefix", "whole")),
    )


def accelerated(recipe: Recipe, model: ImageModel, plan: CheckpointPlan) -> tuple[ImageModel, str]:
    """The model with its UNet compiled or in graphs, checked; and what to tell the person."""
    kernels = recipe.kernels
    if kernels.compile == kernels.cuda_graphs == "none":
        return model, ""
    objective, total = recipe.objective, recipe.sampler.num_inference_steps
    probe = Probe(
        model=model,
        batch_size=recipe.train.batch_size,
        plan=plan,
        trajectory=Trajectory(
            num_steps=total,
            grad_steps=tuple(range(total - len(plan.steps), total)),
            input_grad=objective.input_grad,
            uncond_grad=objective.uncond_grad,
        ),
        uncond_trained=recipe.text.uncond_encoder == "trained",
    )
    unet, said = accelerate(probe, compile=kernels.compile, cuda_graphs=kernels.cuda_graphs)
    return dataclasses.replace(model, unet=unet), said


def refuse_switches(recipe: Recipe, device: torch.device, plan: CheckpointPlan | None = None) -> None:
    """`refuse_acceleration` for the recipe's switches; ``plan`` once it is known."""
    refuse_acceleration(
        compile=recipe.kernels.compile,
        cuda_graphs=recipe.kernels.cuda_graphs,
        device_type=device.type,
        plan=plan,
        policy=recipe.memory.policy,
    )
