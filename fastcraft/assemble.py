"""From a recipe to its parts. Only this file and `policy.py` read the whole recipe; others get plain arguments."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcraft.data.order import PromptOrder
from fastcraft.data.prompts import load_prompts
from fastcraft.diffusion.prefix_store import DiskStore, MemoryStore, Prefixes, prefix_context
from fastcraft.diffusion.samplers import SAMPLERS
from fastcraft.diffusion.text_kv import use_text_kv
from fastcraft.diffusion.use_kernels import use_kernels
from fastcraft.errors import UserError
from fastcraft.evaluation.scores import Exam
from fastcraft.families.components import Components, load_components
from fastcraft.families.image_model import ImageModel
from fastcraft.forecast.networks import networks_of
from fastcraft.forecast.planner import AutoPlan
from fastcraft.memory.plan import CheckpointPlan
from fastcraft.objectives import OBJECTIVES
from fastcraft.objectives.reward_backprop import BackpropSettings
from fastcraft.policy import accelerated, policy_of, refuse_switches
from fastcraft.recipe import Recipe, RewardConfig
from fastcraft.registry import resolve
from fastcraft.rewards import RewardSpec, build_rewards
from fastcraft.rewards.clip_tower import Towers
from fastcraft.rewards.mix import WeightedRewards
from fastcraft.text.encoder import TextEncoder, split_encoders
from fastcraft.text.prompt_encoder import PromptEncoder
from fastcraft.text.tokenize import tokenize

MAX_COUNTED = 100_000
_ENTRY_HEADER = 512  # bytes that a file of the prefix store has besides its latents, at most
SHAPES = Path(__file__).parent / "shapes"


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything one run is made of, before an engine is put around ``trained``."""

    components: Components
    trained: TextEncoder
    original: TextEncoder
    image_model: ImageModel
    rewards: Any
    held_out: WeightedRewards | None
    prompts: Sequence[str]
    prompts_summary: str
    evaluation_prompts: list[str]
    exam: Exam | None
    make_plan: Callable[[int], CheckpointPlan]
    auto: AutoPlan | None = None
    acceleration: str = ""


def assemble(recipe: Recipe, *, device: torch.device) -> Parts:
    """Build every part of a run.

    Args:
        recipe: checked on construction.
        device: where the networks go.

    Raises:
        UserError: a name, a file or a model that is not there or does not fit.
    """
    dtype = getattr(torch, recipe.train.dtype)
    if not recipe.rewards:
        raise UserError("rewards: at least one [[rewards]] table is required, got none")
    refuse_switches(recipe, device)
    if recipe.memory.policy != "auto":
        policy_of(recipe, None, device)  # a wrong name is said before anything is loaded
    sampler_class = SAMPLERS.get(recipe.sampler.name)
    OBJECTIVES.get(recipe.objective.name)
    if not recipe.prompts.path:
        raise UserError("prompts.path: a prompt file is required (--prompts FILE), got ''")
    source = load_prompts(
        prompt_file(recipe.prompts.path), column=recipe.prompts.column, max_characters=recipe.prompts.max_characters
    )
    exam = _exam(recipe.evaluate.exam)
    model_path = SHAPES / "weights" / "pipeline" if recipe.model.path == "shapes" else recipe.model.path
    components = load_components(model_path, dtype=dtype, device=device, resolution=recipe.model.resolution)
    use_text_kv(components.unet)
    num_truncated = _count_truncated(components.tokenizer, source.prompts)
    torch.manual_seed(recipe.train.seed)  # the adapters' initialisation, equal on every rank
    trained, original = split_encoders(
        components.text_encoder,
        train=recipe.text.train,
        dtype=dtype,
        lora_rank=recipe.text.lora_rank,
        lora_alpha=recipe.text.lora_alpha,
        gradient_checkpointing=recipe.text.gradient_checkpointing,
    )
    towers = Towers(device=device, dtype=dtype, bundled=SHAPES / "weights" / "reward")
    sampler = sampler_class(
        components.schedule,
        num_inference_steps=recipe.sampler.num_inference_steps,
        eta=recipe.sampler.eta,
        spacing=recipe.sampler.timestep_spacing,
    )
    rewards = build_rewards(_specs(recipe.rewards), towers=towers, normalize=recipe.objective.normalize_rewards)
    held_out = build_rewards(_specs(recipe.held_out), towers=towers, require_grad=False) if recipe.held_out else None
    judges = [network for mix in (rewards, held_out) if mix is not None for network in mix.image_networks]
    use_kernels(
        [components.unet, components.vae, *judges],
        backend=recipe.kernels.backend,
        device=device,
        attention_table=recipe.kernels.attention_table,
    )
    networks = networks_of(components, trained, rewards, name=recipe.model.path)
    make_plan, auto = policy_of(recipe, networks, device)
    image_model = ImageModel(
        unet=components.unet,
        vae=components.vae,
        sampler=sampler,
        guidance_scale=recipe.sampler.guidance_scale,
        latent_shape=components.latent_shape,
        device=device,
        straight_through_clamp=recipe.objective.straight_through_clamp,
    )
    image_model, acceleration = accelerated(recipe, image_model, make_plan(recipe.objective.backprop_steps))
    return Parts(
        components=components,
        trained=trained,
        original=original,
        image_model=image_model,
        rewards=rewards,
        held_out=held_out,
        prompts=source.prompts,
        prompts_summary=source.summary() + num_truncated,
        evaluation_prompts=_evaluation_prompts(recipe, source.prompts),
        exam=exam,
        make_plan=make_plan,
        auto=auto,
        acceleration=acceleration,
    )


def _specs(rewards: Sequence[RewardConfig]) -> list[RewardSpec]:
    return [RewardSpec(entry.name, entry.weight, entry.path, entry.options, entry.label) for entry in rewards]


def make_objective(recipe: Recipe, parts: Parts, encode: Callable[[Tensor], Tensor]) -> tuple[Any, PromptEncoder]:
    """The objective over ``encode``, which is the engine's forward; and the prompt encoder that it uses."""
    settings, text = recipe.objective, recipe.text
    encoder = PromptEncoder(
        parts.components.tokenizer,
        trained=encode,
        original=parts.original,
        device=parts.image_model.device,
        guided=recipe.sampler.guidance_scale != 1,
        uncond_encoder=text.uncond_encoder,
    )
    objective = OBJECTIVES.get(settings.name)(
        encoder,
        parts.image_model,
        rewards=parts.rewards,
        make_plan=parts.make_plan,
        settings=BackpropSettings(
            backprop_steps=settings.backprop_steps,
            truncation=settings.truncation,
            truncation_std=settings.truncation_std,
            early_stop_steps=settings.early_stop_steps,
            input_grad=settings.input_grad,
            uncond_grad=settings.uncond_grad,
            prefix_encoder=text.prefix_encoder,
            low_variance_draws=settings.low_variance_draws,
            loss=settings.loss,
            hinge_margin=settings.hinge_margin,
            loss_scale=settings.loss_scale,
            anchor_weight=settings.anchor_weight,
        ),
        seed=recipe.train.seed,
        prefixes=_prefixes(recipe, parts) if recipe.memory.keeps_prefixes else None,
    )
    return objective, encoder


def make_order(recipe: Recipe, parts: Parts, *, world_size: int) -> PromptOrder:
    """Which prompts and noise every micro-step of every rank gets.

    Raises:
        UserError: pairs are to be reused, and the pool does not divide into micro-batches or does not fit the store.
    """
    memory, samples = recipe.memory, recipe.train.batch_size * world_size
    if memory.prefix_reuse > 1:
        if memory.prefix_pool % samples:
            raise UserError(
                f"memory.prefix_pool must be a multiple of train.batch_size x ranks ({recipe.train.batch_size} x "
                f"{world_size}), got {memory.prefix_pool}"
            )
        held = memory.prefix_pool // (world_size if memory.prefix_store == "memory" else 1)
        need = held * (4 * math.prod(parts.image_model.latent_shape) + _ENTRY_HEADER)
        if need > memory.prefix_store_mib * 2**20:
            raise UserError(
                f"memory.prefix_store_mib must hold the {held} latents of the pool, at least "
                f"{math.ceil(need / 2**20)}, got {memory.prefix_store_mib}"
            )
    return PromptOrder(parts.prompts, seed=recipe.train.seed, reuse=memory.prefix_reuse, pool=memory.prefix_pool)


def _prefixes(recipe: Recipe, parts: Parts) -> Prefixes:
    memory, model = recipe.memory, parts.image_model
    max_bytes = memory.prefix_store_mib * 2**20
    if memory.prefix_store == "memory":
        return Prefixes(store=MemoryStore(max_bytes=max_bytes), context="")  # one model for its whole life
    settings = {
        "num_frozen_steps": recipe.sampler.num_inference_steps - recipe.objective.backprop_steps,
        "sampler": dataclasses.asdict(recipe.sampler),
        "schedule": dataclasses.asdict(parts.components.schedule),
        "latent_shape": model.latent_shape,
        "device": model.device.type,
        "kernels": (recipe.kernels.backend, recipe.kernels.compile),
    }
    context = prefix_context([model.unet, parts.original], settings)
    return Prefixes(store=DiskStore(Path(memory.prefix_store).expanduser(), max_bytes=max_bytes), context=context)


def prompt_file(path: str) -> Path:
    """A prompt file; ``shapes`` and ``shapes:NAME`` are those of the bundled miniature world.

    Raises:
        UserError: no bundled file of that name.
    """
    name, _, which = path.partition(":")
    if name != "shapes":
        return Path(path)
    file = SHAPES / "prompts" / f"{which or 'train'}.txt"
    if not file.is_file():
        known = ", ".join(f"shapes:{other.stem}" for other in sorted(file.parent.glob("*.txt")))
        raise UserError(f"prompts.path: unknown bundled prompts {path!r}; known: {known}")
    return file


def _count_truncated(tokenizer: Any, prompts: Sequence[str]) -> str:
    """A note on prompts that lose tokens at the encoder's length; of a large file its first prompts are looked at."""
    looked_at = min(len(prompts), MAX_COUNTED)
    num_truncated = sum(
        tokenize(tokenizer, [prompts[i] for i in range(first, min(first + 1000, looked_at))]).num_truncated
        for first in range(0, looked_at, 1000)
    )
    if not num_truncated:
        return ""
    among = "" if looked_at == len(prompts) else f" among the first {looked_at}"
    return f"; {num_truncated} cut at {tokenizer.model_max_length} tokens{among}"


def _evaluation_prompts(recipe: Recipe, prompts: Sequence[str]) -> list[str]:
    wanted = max(recipe.evaluate.num_samples, recipe.evaluate.exam_num_samples)
    if recipe.evaluate.prompts:
        prompts = load_prompts(prompt_file(recipe.evaluate.prompts), column=recipe.prompts.column).prompts
    return [prompts[index] for index in range(min(wanted, len(prompts)))]


def _exam(path: str) -> Exam | None:
    if not path:
        return None
    return resolve("fastcraft.shapes.judge:exam" if path == "shapes" else path, "evaluate.exam")
