"""What ``--dry-run`` prints: the resolved recipe, the plan, the parameter counts and what one step takes."""

from fastcraft.assemble import Parts
from fastcraft.config import dump_recipe
from fastcraft.forecast.cost import parameter_counts
from fastcraft.forecast.networks import networks_of
from fastcraft.forecast.planner import describe as describe_plan
from fastcraft.memory.plan import KEEP, RECOMPUTE
from fastcraft.policy import run_planner
from fastcraft.recipe import Recipe


def describe(recipe: Recipe, parts: Parts, *, world_size: int) -> str:
    """Several lines for the terminal; counts bytes and FLOPs on tensors without contents, trains nothing."""
    model, train, depth = parts.image_model, recipe.train, recipe.objective.backprop_steps
    plan = parts.make_plan(depth)
    samples = train.batch_size * train.gradient_accumulation_steps
    judges = [judge for judge in (parts.rewards, parts.held_out) if judge is not None]
    trainable, frozen = parameter_counts(parts.trained, parts.original, model.unet, model.vae, *judges)
    lines = [
        dump_recipe(recipe).rstrip(),
        "",
        f"plan        {recipe.memory.policy}: {depth} steps with gradient: "
        f"{describe_plan(plan, batch_size=train.batch_size)}",
        f"parameters  {trainable:,} trainable, {frozen:,} frozen",
        f"prompts     {parts.prompts_summary}",
        f"per step    {samples} samples on each of {world_size} rank{'s' if world_size > 1 else ''}",
        *([f"fast path   {parts.acceleration}"] if parts.acceleration else []),
    ]
    networks = networks_of(parts.components, parts.trained, parts.rewards, name=recipe.model.path)
    needed = () if parts.auto else {KEEP, RECOMPUTE, *plan.steps}
    planner = run_planner(recipe, networks, model.device, treatments=needed)
    full = planner.predict(planner.weigh(plan, batch_size=train.batch_size))
    phases = ", ".join(f"{name} {seconds / full.seconds:.0%}" for name, seconds in full.seconds_by_phase.items())
    gflop = full.flops * train.gradient_accumulation_steps / 1e9
    peak, saved, had = (
        f"{size / 2**20:,.0f} MiB" for size in (full.peak_bytes, full.saved_bytes, planner.budget_bytes)
    )
    return "\n".join(
        [
            *lines,
            f"            {gflop:,.1f} GFLOP a rank; of the predicted time: {phases}",
            f"memory      {peak} predicted at the peak ({full.at}), {saved} saved by the steps; {had} to be had",
        ]
    )
