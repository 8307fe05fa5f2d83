"""A whole run: every part of it, and the objective once an engine is around what is trained."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastcraft.build.judges import Judges, build_judges
from fastcraft.build.model import BuiltModel, build_model
from fastcraft.build.plan import Plans, accelerated, build_plans, check_plan, check_switches
from fastcraft.build.prompts import Prompts, build_prompts, count_truncated
from fastcraft.data.order import PromptOrder
from fastcraft.diffusion.prefix_store import DiskStore, MemoryStore, Prefixes, prefix_context
from fastcraft.errors import UserError, named
from fastcraft.families.image_model import ImageModel
from fastcraft.forecast.networks import Networks, networks_of
from fastcraft.objectives import OBJECTIVES
from fastcraft.objectives.base import Objective
from fastcraft.recipe import Recipe
from fastcraft.records import PromptBatch

_ENTRY_HEADER = 512  # bytes that a file of the prefix store has besides its latents, at most


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything one run is made of, before an engine is put around ``model.trained``."""

    model: BuiltModel
    judges: Judges
    prompts: Prompts
    networks: Networks
    plans: Plans
    acceleration: str = ""


def build_run(recipe: Recipe, *, device: torch.device) -> Parts:
    """Build every part of a run, the cheap ones and what they could get wrong first.

    Args:
        recipe: checked on construction.
        device: where the networks go.

    Raises:
        UserError: a name, a file or a model that is not there or does not fit.
    """
    check_switches(recipe, device)
    if recipe.memory.policy != "auto":
        check_plan(recipe, device)
    prompts = build_prompts(recipe)
    model = build_model(recipe, device=device)
    judges = build_judges(recipe, device=device)
    networks = networks_of(model.components, model.trained, judges.rewards, name=recipe.model.path)
    plans = build_plans(recipe, networks, device)
    images, acceleration = accelerated(recipe, model.images, plans.make(recipe.objective.settings.needs.backprop_steps))
    truncated = count_truncated(model.components.tokenizer, prompts.training)
    return Parts(
        model=dataclasses.replace(model, images=images),
        judges=judges,
        prompts=dataclasses.replace(prompts, summary=prompts.summary + truncated),
        networks=networks,
        plans=plans,
        acceleration=acceleration,
    )


def build_objective(
    recipe: Recipe, parts: Parts, images: ImageModel, *, rank: int = 0, world_size: int = 1
) -> Objective:
    """The recipe's objective.

    Args:
        recipe: of the run.
        parts: from `build_run`.
        images: the model to train through, see `BuiltModel.through`.
        rank: this process's number.
        world_size: number of ranks.

    Raises:
        UserError: pairs are to be reused, and the pool does not divide into micro-batches or does not fit the store.
    """
    train, order = recipe.train, build_order(recipe, parts.prompts.training, images, world_size=world_size)

    def batches(first: int) -> PromptBatch:
        return order.batch(first, rank, batch_size=train.batch_size)

    return OBJECTIVES.get(recipe.objective.name)(
        images,
        rewards=parts.judges.rewards,
        batches=batches,
        samples_per_micro=world_size * train.batch_size,
        micro_steps=train.gradient_accumulation_steps,
        make_plan=parts.plans.make,
        settings=recipe.objective.settings,
        prefix_by=recipe.text.prefix_encoder,
        seed=train.seed,
        prefixes=_prefixes(recipe, parts, images) if recipe.memory.keeps_prefixes else None,
    )


def build_order(recipe: Recipe, prompts: Sequence[str], images: ImageModel, *, world_size: int) -> PromptOrder:
    """Which prompts and noise every micro-step of every rank gets.

    Raises:
        UserError: see `build_objective`.
    """
    memory, samples = recipe.memory, recipe.train.batch_size * world_size
    if memory.prefix_reuse > 1:
        if memory.prefix_pool % samples:
            raise UserError(
                f"memory.prefix_pool must be a multiple of train.batch_size x ranks ({recipe.train.batch_size} x "
                f"{world_size}), got {memory.prefix_pool}"
            )
        held = memory.prefix_pool // (world_size if memory.prefix_store == "memory" else 1)
        need = held * (4 * math.prod(images.latent_shape) + _ENTRY_HEADER)
        if need > memory.prefix_store_mib * 2**20:
            raise UserError(
                f"memory.prefix_store_mib must hold the {held} latents of the pool, at least "
                f"{math.ceil(need / 2**20)}, got {memory.prefix_store_mib}"
            )
    return PromptOrder(prompts, seed=recipe.train.seed, reuse=memory.prefix_reuse, pool=memory.prefix_pool)


def _prefixes(recipe: Recipe, parts: Parts, images: ImageModel) -> Prefixes:
    memory = recipe.memory
    max_bytes = memory.prefix_store_mib * 2**20
    if memory.prefix_store == "memory":
        return Prefixes(store=MemoryStore(max_bytes=max_bytes), context="")  # one model for its whole life
    settings = {
        "num_frozen_steps": recipe.sampler.num_inference_steps - recipe.objective.settings.needs.backprop_steps,
        "sampler": dataclasses.asdict(recipe.sampler),
        "schedule": dataclasses.asdict(parts.model.components.schedule),
        "latent_shape": images.latent_shape,
        "device": images.device.type,
        "kernels": (recipe.kernels.backend, recipe.kernels.compile),
    }
    text = parts.model.trained.parts["text"]
    context = prefix_context([images.network.module, text.original or text.module], settings)
    with named("memory.prefix_store: "):
        store = DiskStore(Path(memory.prefix_store).expanduser(), max_bytes=max_bytes)
    return Prefixes(store=store, context=context)
