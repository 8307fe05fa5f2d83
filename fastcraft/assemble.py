"""From a recipe to its parts: the only place that reads the whole recipe and hands plain arguments on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcraft.data.prompts import load_prompts
from fastcraft.diffusion.components import Components, load_components
from fastcraft.diffusion.image_model import ImageModel
from fastcraft.diffusion.samplers import SAMPLERS
from fastcraft.diffusion.text_kv import use_text_kv
from fastcraft.errors import UserError
from fastcraft.evaluation.scores import Exam
from fastcraft.memory.policies import POLICIES
from fastcraft.objectives import OBJECTIVES
from fastcraft.objectives.reward_backprop import BackpropSettings
from fastcraft.recipe import KernelsConfig, Recipe
from fastcraft.records import CheckpointPlan
from fastcraft.registry import resolve
from fastcraft.rewards import build_rewards
from fastcraft.text.encoder import TextEncoder, split_encoders
from fastcraft.text.prompt_encoder import PromptEncoder
from fastcraft.text.tokenize import tokenize

MAX_COUNTED = 100_000
SHAPES = Path(__file__).parent / "shapes"


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything one run is made of, before an engine is put around ``trained``."""

    components: Components
    trained: TextEncoder
    original: TextEncoder
    image_model: ImageModel
    rewards: Any
    prompts: Sequence[str]
    prompts_summary: str
    evaluation_prompts: list[str]
    exam: Exam | None
    make_plan: Callable[[int], CheckpointPlan]


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
    policy = POLICIES.get(recipe.memory.policy)()
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
    _use_kernels(recipe.kernels, components, device)
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
    sampler = sampler_class(
        components.schedule,
        num_inference_steps=recipe.sampler.num_inference_steps,
        eta=recipe.sampler.eta,
        spacing=recipe.sampler.timestep_spacing,
    )
    return Parts(
        components=components,
        trained=trained,
        original=original,
        image_model=ImageModel(
            unet=components.unet,
            vae=components.vae,
            sampler=sampler,
            guidance_scale=recipe.sampler.guidance_scale,
            latent_shape=components.latent_shape,
            device=device,
        ),
        rewards=build_rewards(
            [(reward.name, reward.weight, reward.path, reward.options) for reward in recipe.rewards],
            device=device,
            dtype=dtype,
            bundled=SHAPES / "weights" / "reward",
            normalize=recipe.objective.normalize_rewards,
        ),
        prompts=source.prompts,
        prompts_summary=source.summary() + num_truncated,
        evaluation_prompts=_evaluation_prompts(recipe, source.prompts),
        exam=exam,
        make_plan=partial(policy.plan, decode_micro_batch=recipe.memory.decode_micro_batch),
    )


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
    )
    return objective, encoder


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


def _use_kernels(settings: KernelsConfig, components: Components, device: torch.device) -> None:
    """Patch UNet and VAE for the rest of the process; ``kernels.backend`` says when."""
    if settings.attention_table:
        from fastcraft_kernels.attention import load_attention_table

        try:
            load_attention_table(settings.attention_table)
        except ValueError as error:
            raise UserError(f"kernels.attention_table: {error}") from error
    if settings.backend == "triton" or (settings.backend == "auto" and device.type == "cuda"):
        from fastcraft.diffusion.patch import Patch  # the ops take a second to load; a run without them need not wait

        Patch(components.unet, components.vae, backend=settings.backend).apply()


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
