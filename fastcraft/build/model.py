"""The model of a recipe: loaded, its trained parts told apart, its layers patched; without rewards or prompts."""

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastcraft.diffusion.samplers import SAMPLERS
from fastcraft.diffusion.use_kernels import use_kernels
from fastcraft.errors import UserError, named
from fastcraft.families.components import Components, load_components
from fastcraft.families.image_model import ImageModel
from fastcraft.families.unet import UNetNetwork, use_text_kv
from fastcraft.recipe import Recipe, TrainedConfig
from fastcraft.shapes import PIPELINE
from fastcraft.text.encoder import TextEncoder, recompute_layers
from fastcraft.text.prompt_encoder import PromptEncoder
from fastcraft.trained.lora import TEXT_TARGETS, UNET_CONV_TARGETS, UNET_LINEAR_TARGETS, UNET_TARGETS, inject_lora
from fastcraft.trained.trained_set import TrainedPart, TrainedSet, frozen_copy
from fastcraft.weights.parts import apply_weights
from fastcraft.weights.readers import read_weights

NOT_TRAINED = TrainedConfig(mode="none")
_UNET_PRESETS = {(): UNET_TARGETS, ("linear",): UNET_LINEAR_TARGETS, ("linear+conv",): UNET_CONV_TARGETS}
_TEXT_PRESETS = {(): TEXT_TARGETS, ("linear",): (*TEXT_TARGETS, "fc1", "fc2")}


@dataclass(frozen=True, kw_only=True)
class BuiltModel:
    """A model ready to sample with, and to train once an engine is around ``trained``.

    ``exact`` has the float32 values of trained weights that are bfloat16, by name in ``trained``; the engine takes
    them.
    """

    components: Components
    trained: TrainedSet
    images: ImageModel
    exact: MutableMapping[str, Tensor]

    def through(self, forward: Callable[..., Tensor]) -> ImageModel:
        """The image model whose trained encoder is called by way of ``forward``, an engine's, say."""
        assert self.images.text is not None
        return replace(self.images, text=self.images.text.through(partial(forward, "text")))


def build_model(recipe: Recipe, *, device: torch.device) -> BuiltModel:
    """Load and prepare the model.

    Args:
        recipe: of it the sections model, text, trained, sampler and kernels, and what the objective needs of a model.
        device: where the networks go.

    Raises:
        UserError: a name, a file or a model that is not there or does not fit.
    """
    dtype = getattr(torch, recipe.train.dtype)
    with named("sampler.name: "):
        make_grid = SAMPLERS.get(recipe.sampler.name)
    text, unet = (recipe.trained.get(part, NOT_TRAINED) for part in ("text", "unet"))
    with named("model."):
        components = load_components(
            PIPELINE if recipe.model.path == "shapes" else recipe.model.path,
            dtype=dtype, unet_dtype=torch.float32 if unet.mode == "full" or unet.start else dtype, device=device,
            resolution=recipe.model.resolution,
        )  # fmt: skip
    torch.manual_seed(recipe.train.seed)  # the adapters' initialisation, equal on every rank
    unet_part, exact = _unet_part(components.unet, unet, recipe, dtype)
    text_part = _text_part(components.text_encoder, text, recipe, dtype, exact=exact, rounded=bool(exact))
    with named("model."):
        use_text_kv(components.unet)
    with named("kernels."):
        use_kernels(
            [components.unet, components.vae], backend=recipe.kernels.backend, device=device,
            attention_table=recipe.kernels.attention_table,
        )  # fmt: skip
    trained = TrainedSet([text_part, *([unet_part] if unet_part.mode != "frozen" else [])], dtype=dtype)
    with named("sampler."):
        sampler = make_grid(
            components.schedule,
            num_inference_steps=recipe.sampler.num_inference_steps,
            eta=recipe.sampler.eta,
            spacing=recipe.sampler.timestep_spacing,
        )
    encoder = PromptEncoder(
        components.tokenizer,
        trained=partial(trained, "text"),
        original=trained.original("text"),
        device=device,
        guided=recipe.sampler.guidance_scale != 1,
        uncond_by=recipe.text.uncond_encoder,
    )
    images = ImageModel(
        text=encoder,
        network=UNetNetwork(module=components.unet),
        vae=components.vae,
        sampler=sampler,
        guidance_scale=recipe.sampler.guidance_scale,
        latent_shape=components.latent_shape,
        device=device,
        straight_through_clamp=recipe.objective.settings.needs.straight_through_clamp,
    )
    return BuiltModel(components=components, trained=trained, images=images, exact=exact)


def _text_part(
    model: Any, config: TrainedConfig, recipe: Recipe, dtype: torch.dtype, *, exact: MutableMapping[str, Tensor],
    rounded: bool,
) -> TrainedPart:  # fmt: skip
    """The text encoder as a part; ``rounded``: the engine trains bfloat16 weights, so these are rounded too."""
    keeps_copy = config.mode == "full" or bool(config.start)
    original = TextEncoder(frozen_copy(model, dtype)) if keeps_copy else None
    _begin_at(model, config, "text")
    if config.mode == "lora":
        _adapt(model, config, "text", _TEXT_PRESETS)
    elif config.mode == "full":
        model.requires_grad_(True)
    else:
        model.to(dtype).requires_grad_(False)
    if config.gradient_checkpointing:
        recompute_layers(model)
    part = TrainedPart(
        name="text", module=TextEncoder(model), mode="frozen" if config.mode == "none" else config.mode,
        learning_rate=config.learning_rate or recipe.train.learning_rate, original=original,
        ema_decay=config.ema_decay,
    )  # fmt: skip
    if rounded:
        exact.update(_round(part))
    return part


def _unet_part(
    unet: Any, config: TrainedConfig, recipe: Recipe, dtype: torch.dtype
) -> tuple[TrainedPart, dict[str, Tensor]]:
    """The UNet as a part, and the exact values of its weights where bfloat16 ones are trained."""
    _begin_at(unet, config, "unet")
    exact: dict[str, Tensor] = {}
    if config.mode == "full":
        unet.requires_grad_(True)
    elif config.mode == "lora":
        torch.nn.Module.to(unet, dtype)  # diffusers' own `to` warns about nothing here
        _adapt(unet, config, "unet", _UNET_PRESETS)
    else:
        torch.nn.Module.to(unet, dtype)
    part = TrainedPart(
        name="unet", module=unet, mode="frozen" if config.mode == "none" else config.mode,
        learning_rate=config.learning_rate or recipe.train.learning_rate, ema_decay=config.ema_decay,
    )  # fmt: skip
    if config.mode == "full" and dtype != torch.float32:
        exact = _round(part)
    return part, exact


def _begin_at(model: Any, config: TrainedConfig, part: str) -> None:
    """Put the weights of ``start`` into the model."""
    if config.start:
        with named(f"trained.{part}.start: "):
            apply_weights(model, read_weights(config.start, part, [name for name, _ in model.named_modules()]))


def _adapt(model: Any, config: TrainedConfig, part: str, presets: dict[Any, tuple[str, ...]]) -> None:
    targets = presets.get(config.targets, config.targets)
    try:
        inject_lora(model, rank=config.rank, alpha=config.alpha, targets=targets, rslora=config.rslora)
    except ValueError as error:
        raise UserError(f"trained.{part}.{error}") from error


def _round(part: TrainedPart) -> dict[str, Tensor]:
    """Make a part's trained weights bfloat16, and its module with them; the values before, on the CPU."""
    exact = {f"{part.name}.{name}": param.detach().float().cpu() for name, param in part.parameters()}
    torch.nn.Module.to(part.module, torch.bfloat16)
    return exact
