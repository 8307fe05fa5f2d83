"""What ``--dry-run`` prints: the resolved recipe, the plan, the parameter counts and what one step takes."""

from typing import Any

from fastcraft.build.plan import run_planner
from fastcraft.build.run import Parts
from fastcraft.config import dump_recipe
from fastcraft.forecast.cost import parameter_counts
from fastcraft.forecast.planner import describe as describe_plan
from fastcraft.memory.plan import KEEP, RECOMPUTE
from fastcraft.recipe import Recipe


def describe(recipe: Recipe, parts: Parts, *, world_size: int) -> str:
    """Several lines for the terminal; counts bytes and FLOPs on tensors without contents, trains nothing."""
    model, train, depth = parts.model.images, recipe.train, recipe.objective.settings.needs.backprop_steps
    plan = parts.plans.make(depth)
    samples = train.batch_size * train.gradient_accumulation_steps
    judges = [judge for judge in (parts.judges.rewards, parts.judges.held_out) if judge is not None]
    trainable, frozen = parameter_counts(*networks_in(parts), *judges)
    lines = [
        dump_recipe(recipe).rstrip(),
        "",
        f"plan        {recipe.memory.policy}: {depth} steps with gradient: "
        f"{describe_plan(plan, batch_size=train.batch_size)}",
        f"parameters  {trainable:,} trainable, {frozen:,} frozen",
        f"prompts     {parts.prompts.summary}",
        f"per step    {samples} samples on each of {world_size} rank{'s' if world_size > 1 else ''}",
        *([f"fast path   {parts.acceleration}"] if parts.acceleration else []),
    ]
    needed = () if parts.plans.auto else {KEEP, RECOMPUTE, *plan.steps}
    planner = run_planner(recipe, parts.networks, model.device, treatments=needed)
    full = planner.predict(planner.weigh(plan, batch_size=train.batch_size))
    phases = ", ".join(f"{name} {seconds / full.seconds:.0%}" for name, seconds in full.seconds_by_phase.items())
    gflop = full.flops * train.gradient_accumulation_steps / 1e9
    peak, saved, budget = (
        f"{size / 2**20:,.0f} MiB" for size in (full.peak_bytes, full.saved_bytes, planner.budget_bytes)
    )
    return "\n".join(
        [
            *lines,
            f"            {gflop:,.1f} GFLOP a rank; of the predicted time: {phases}",
            f"memory      {peak} predicted at the peak ({full.at}), {saved} saved by the steps; {budget} to be had",
        ]
    )


def networks_in(parts: Parts) -> list[Any]:
    """Every network of the model once: what is trained, its originals, the denoiser and the VAE."""
    trained = parts.model.trained
    originals = [part.original for part in trained.parts.values() if part.original is not None]
    denoiser = [] if "unet" in trained.parts else [parts.model.components.unet]
    return [trained, *originals, *denoiser, parts.model.components.vae]
