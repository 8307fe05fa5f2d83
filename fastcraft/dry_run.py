"""What ``--dry-run`` prints: the resolved recipe, the plan, the parameter counts and what one step costs."""

import torch

from fastcraft.assemble import Parts
from fastcraft.config import dump_recipe
from fastcraft.diffusion.unroll import predict_noise
from fastcraft.memory.cost import count_flops, parameter_counts, step_flops
from fastcraft.recipe import Recipe
from fastcraft.records import KEEP, RECOMPUTE, CheckpointPlan, PromptEmbeds


def describe(recipe: Recipe, parts: Parts, *, world_size: int) -> str:
    """Several lines for the terminal; counts FLOPs under fake tensors, trains nothing."""
    model, train = parts.image_model, recipe.train
    plan = parts.make_plan(recipe.objective.backprop_steps)
    ids = torch.zeros(1, 1, parts.components.tokenizer.model_max_length, dtype=torch.long, device=model.device)
    with torch.no_grad():
        text_kv = model.text_kv(PromptEmbeds(cond=parts.original(ids)))
    timestep = torch.zeros((), dtype=torch.long, device=model.device)
    shape = (1, *model.latent_shape)
    samples = train.batch_size * train.gradient_accumulation_steps
    flops = step_flops(
        count_flops(
            lambda x: predict_noise(model.unet, x, timestep, text_kv, guidance_scale=1), shape, device=model.device
        ),
        count_flops(lambda x: model.decode(x, CheckpointPlan(steps=(), decode=KEEP)), shape, device=model.device),
        samples=samples,
        num_inference_steps=recipe.sampler.num_inference_steps,
        backprop_steps=recipe.objective.backprop_steps,
        guided=model.guidance_scale != 1,
        recompute=plan.decode == RECOMPUTE,
    )
    judges = torch.nn.ModuleList([judge for judge in (parts.rewards, parts.held_out) if judge is not None])
    trainable, frozen = parameter_counts(parts.trained, parts.original, model.unet, model.vae, judges)
    phases = ", ".join(f"{name} {value / 1e9:,.1f}" for name, value in flops.items())
    return "\n".join(
        [
            dump_recipe(recipe).rstrip(),
            "",
            f"plan        {recipe.memory.policy}: {len(plan.steps)} steps with gradient: {', '.join(plan.steps)}; "
            f"decode: {plan.decode}",
            f"parameters  {trainable:,} trainable, {frozen:,} frozen",
            f"prompts     {parts.prompts_summary}",
            f"per step    {samples} samples on each of {world_size} rank{'s' if world_size > 1 else ''}; "
            f"{sum(flops.values()) / 1e9:,.1f} GFLOP a rank: {phases} (rewards and text encoder not counted)",
        ]
    )
