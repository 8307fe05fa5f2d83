"""What a recipe must fulfil besides the type of each value: ranges, and rules between sections.

A recipe is a `fastcraft.recipe.Recipe`, which calls `check_recipe` when it is made.
"""

from typing import Any

from fastcraft.errors import UserError, named

PARTS = ("text", "unet")
"""What can be trained."""

_AT_LEAST: dict[str, float] = {
    "model.resolution": 0, "prompts.max_characters": 1,
    "sampler.num_inference_steps": 1, "sampler.guidance_scale": 1, "sampler.eta": 0, "memory.decode_micro_batch": 0,
    "memory.budget_gib": 0, "memory.prefix_reuse": 1, "memory.prefix_pool": 1, "memory.prefix_store_mib": 1,
    "train.num_steps": 1, "train.batch_size": 1, "train.gradient_accumulation_steps": 1, "train.seed": 0,
    "train.eps": 0, "train.weight_decay": 0, "train.max_grad_norm": 0, "train.warmup_steps": 0,
    "train.checkpoint_every": 0, "train.keep_checkpoints": 1, "train.max_bad_steps": 1,
    "evaluate.every": 0, "evaluate.num_samples": 1, "evaluate.batch_size": 1,
    "evaluate.exam_num_samples": 0, "evaluate.trained_steps": 0, "evaluate.held_out_patience": 1,
}  # fmt: skip


def check_recipe(recipe: Any) -> None:
    """Ranges of single fields and rules between fields; raises `UserError` for the first one broken."""
    _check_ranges(recipe)
    sampler = recipe.sampler
    with named("objective."):
        recipe.objective.settings.check(
            num_inference_steps=sampler.num_inference_steps, prefix_by=recipe.text.prefix_encoder
        )
    if recipe.evaluate.trained_steps > sampler.num_inference_steps:
        raise UserError(
            f"evaluate.trained_steps must be at most sampler.num_inference_steps ({sampler.num_inference_steps}), "
            f"got {recipe.evaluate.trained_steps}"
        )
    _check_trained(recipe)
    _check_prefix(recipe)
    _check_rewards(recipe)


def _check_ranges(recipe: Any) -> None:
    def value(key: str) -> float:
        section, name = key.split(".")
        return getattr(getattr(recipe, section), name)

    for key, least in _AT_LEAST.items():
        if not value(key) >= least:
            raise UserError(f"{key} must be at least {least}, got {value(key)}")
    if recipe.sampler.eta > 1:
        raise UserError(f"sampler.eta must be at most 1, got {recipe.sampler.eta}")
    if not recipe.train.learning_rate > 0:
        raise UserError(f"train.learning_rate must be greater than 0, got {recipe.train.learning_rate}")
    for beta in recipe.train.betas:
        if not 0 <= beta < 1:
            raise UserError(f"train.betas must lie in [0, 1), got {list(recipe.train.betas)}")
    if recipe.train.seed >= 2**63:
        raise UserError(f"train.seed must be below 2**63, got {recipe.train.seed}")


def _check_trained(recipe: Any) -> None:
    """Parts that are there, one of them trained, and nothing switched on that would lose a UNet's gradient."""
    for part in recipe.trained:
        if part not in PARTS:
            raise UserError(f"trained: a part is one of {', '.join(PARTS)}, got {part!r}")
    if all(part.mode == "none" for part in recipe.trained.values()):
        raise UserError("trained: at least one part must have a mode other than 'none'")
    unet = recipe.trained.get("unet")
    if unet is None:
        return
    if unet.gradient_checkpointing:
        raise UserError("trained.unet.gradient_checkpointing is for text encoders; a UNet's recompute is memory.policy")
    if unet.mode == "none":
        return
    if recipe.memory.policy.startswith("batched"):
        raise UserError(
            f"memory.policy: {recipe.memory.policy!r} differentiates the text alone; with trained.unet.mode = "
            f"{unet.mode!r} take 'step', which takes as little memory"
        )
    for switch in ("compile", "cuda_graphs"):
        if (setting := getattr(recipe.kernels, switch)) != "none":
            raise UserError(
                f"kernels.{switch} must be 'none' with trained.unet.mode = {unet.mode!r}: weights in compiled code and "
                f"in graphs are constants, got {setting!r}"
            )
    if recipe.memory.keeps_prefixes:
        raise UserError(
            f"memory.prefix_reuse and memory.prefix_store keep what a frozen UNet makes; with trained.unet.mode = "
            f"{unet.mode!r} it changes with every step"
        )


def _check_prefix(recipe: Any) -> None:
    """What keeps the latents of the frozen steps must find them unchanged the next time."""
    memory, needs = recipe.memory, recipe.objective.settings.needs
    if not memory.prefix_store:
        raise UserError("memory.prefix_store must be 'memory' or a folder, got ''")
    if not memory.keeps_prefixes:
        return
    what = "memory.prefix_reuse above 1" if memory.prefix_reuse > 1 else "a folder as memory.prefix_store"
    if (encoder := recipe.text.prefix_encoder) != "original":
        raise UserError(
            f"{what} needs text.prefix_encoder = 'original': what the trained encoder gives changes with every step; "
            f"got {encoder!r}"
        )
    if not needs.fixed_prefix:
        raise UserError(
            f"{what} needs objective.truncation = 'last': elsewhere the frozen steps end at another step each time; "
            f"got {getattr(recipe.objective.settings, 'truncation', recipe.objective.name)!r}"
        )
    if needs.backprop_steps == recipe.sampler.num_inference_steps:
        raise UserError(f"{what} needs frozen steps: objective.backprop_steps below sampler.num_inference_steps")


def _check_rewards(recipe: Any) -> None:
    for section, rewards in (("rewards", recipe.rewards), ("held_out", recipe.held_out)):
        names = [reward.label or reward.name for reward in rewards]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{section}: {name!r} is named twice; give one of them a label")
    if recipe.rewards and all(reward.weight == 0 for reward in recipe.rewards):
        raise UserError("rewards: at least one weight must not be 0")
