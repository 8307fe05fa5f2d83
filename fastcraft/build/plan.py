"""What the steps of a recipe keep for backward, and what its denoiser runs as: the two must fit each other."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from fastcraft.diffusion.acceleration import COMPILED_TREATMENTS, refuse_acceleration
from fastcraft.errors import named
from fastcraft.families.image_model import ImageModel
from fastcraft.families.parity import Probe, accelerate
from fastcraft.forecast.auto import planner_of
from fastcraft.forecast.networks import Networks
from fastcraft.forecast.planner import AutoPlan, Planner
from fastcraft.memory.plan import CheckpointPlan
from fastcraft.memory.policies import plan_maker
from fastcraft.recipe import Recipe
from fastcraft.records import Trajectory


@dataclass(frozen=True, kw_only=True)
class Plans:
    """``make``: from the number of steps with gradient to the plan; ``auto``: the planner behind it, if any."""

    make: Callable[[int], CheckpointPlan]
    auto: AutoPlan | None = None


def build_plans(recipe: Recipe, networks: Networks, device: torch.device) -> Plans:
    """The recipe's policy.

    Raises:
        UserError: see `check_plan`; or a budget that nothing meets.
    """
    if recipe.memory.policy != "auto":
        return Plans(make=check_plan(recipe, device))
    treatments = COMPILED_TREATMENTS.get(recipe.kernels.compile, ())
    planner = run_planner(recipe, networks, device, treatments=treatments)
    auto = AutoPlan(planner, batch_size=recipe.train.batch_size)
    with named("memory.policy: "):
        auto.choose(recipe.objective.settings.needs.backprop_steps)
    return Plans(make=auto.plan, auto=auto)


def check_plan(recipe: Recipe, device: torch.device) -> Callable[[int], CheckpointPlan]:
    """The plan maker of a policy other than ``auto``; before anything is loaded.

    Raises:
        UserError: a policy that is not there, or cannot be had here or with the recipe's switches.
    """
    needs = recipe.objective.settings.needs
    with named("memory.policy: "):
        make = plan_maker(
            recipe.memory.policy, backprop_steps=needs.backprop_steps,
            decode_micro_batch=recipe.memory.decode_micro_batch, device_type=device.type, input_grad=needs.input_grad,
        )  # fmt: skip
    check_switches(recipe, device, make(needs.backprop_steps))
    return make


def check_switches(recipe: Recipe, device: torch.device, plan: CheckpointPlan | None = None) -> None:
    """`refuse_acceleration` for the recipe's switches; ``plan`` once it is known."""
    with named("kernels."):
        refuse_acceleration(
            compile=recipe.kernels.compile,
            cuda_graphs=recipe.kernels.cuda_graphs,
            device_type=device.type,
            plan=plan,
            policy=recipe.memory.policy,
        )


def run_planner(recipe: Recipe, networks: Networks, device: torch.device, *, treatments: Iterable[str] = ()) -> Planner:
    """A planner for a recipe's run on a device; ``treatments`` are what it can weigh, none = all there are."""
    needs = recipe.objective.settings.needs
    return planner_of(
        networks,
        device=device,
        guided=recipe.sampler.guidance_scale != 1,
        uncond_trained=recipe.text.uncond_encoder == "trained",
        num_inference_steps=recipe.sampler.num_inference_steps,
        input_grad=needs.input_grad,
        budget_gib=recipe.memory.budget_gib,
        decode_micro_batch=recipe.memory.decode_micro_batch,
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        treatments=treatments,
        batches=recipe.kernels.compile not in COMPILED_TREATMENTS and not networks.trains_unet,
        unet_copies=int(recipe.kernels.compile in ("prefix", "whole")),
    )


def accelerated(recipe: Recipe, model: ImageModel, plan: CheckpointPlan) -> tuple[ImageModel, str]:
    """The model with its denoiser compiled or in graphs, checked; and what to tell the person."""
    kernels = recipe.kernels
    if kernels.compile == kernels.cuda_graphs == "none":
        return model, ""
    needs, total = recipe.objective.settings.needs, recipe.sampler.num_inference_steps
    probe = Probe(
        model=model,
        batch_size=recipe.train.batch_size,
        plan=plan,
        trajectory=Trajectory(
            num_steps=total,
            grad_steps=tuple(range(total - len(plan.steps), total)),
            input_grad=needs.input_grad,
            uncond_grad=needs.uncond_grad,
        ),
        uncond_trained=recipe.text.uncond_encoder == "trained",
    )
    with named("kernels: "):
        unet, said = accelerate(probe, compile=kernels.compile, cuda_graphs=kernels.cuda_graphs)
    return replace(model, network=model.network.using(unet)), said
