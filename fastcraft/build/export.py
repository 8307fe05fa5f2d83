"""What a finished run leaves for other programs: every trained part in the formats that they read, verified."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcraft.build.run import Parts
from fastcraft.recipe import Recipe
from fastcraft.text.tokenize import tokenize
from fastcraft.trained.trained_set import TrainedPart
from fastcraft.weights.export import export_text_encoder, export_unet
from fastcraft.weights.export_lora import export_lora
from fastcraft.weights.report import ExportReport


def export_run(
    recipe: Recipe, parts: Parts, weights: Mapping[str, Tensor], out: Path, *, title: str
) -> list[ExportReport]:
    """Write every trained part below ``out``: whole ones as a model's folder, adapters as files that any program reads.

    A text encoder with adapters is written both ways, since it is small.

    Args:
        recipe: of the run.
        parts: from `fastcraft.build.run.build_run`.
        weights: what training has made of the trained parameters, float32, by name in ``parts.model.trained``.
        out: the run's ``export`` folder.
        title: a name for the files' metadata.

    Raises:
        ExportError: what was written does not read back as what was trained.
    """
    model, reports = parts.model, []
    components = model.components
    prompts = parts.prompts.evaluation[: recipe.evaluate.num_samples]
    ids = tokenize(components.tokenizer, prompts).input_ids[:, 0]
    call = _unet_call(parts)
    trained = {part.name: _exact(part, weights) for part in model.trained.trained_parts()}
    if "text" in trained:
        reports.append(export_text_encoder(trained["text"], components.folder / "tokenizer", out, reference_ids=ids))
    if "unet" in trained and model.trained.parts["unet"].mode == "full":
        reports.append(export_unet(trained["unet"], out, reference_call=call))
    adapted = {name: module for name, module in trained.items() if model.trained.parts[name].mode == "lora"}
    if adapted:
        size = model.images.latent_shape[-1] * components.pixels_per_latent
        reports += export_lora(
            adapted, out, reference_ids=ids, reference_call=call, title=title, resolution=size
        )  # fmt: skip
    return reports


def _exact(part: TrainedPart, weights: Mapping[str, Tensor]) -> Any:
    """A copy of the part's model with the weights to be exported, in float32 where they are trained."""
    module: Any = part.module.model if part.name.startswith("text") else part.module
    exact = copy.deepcopy(module).requires_grad_(False)
    if part.mode == "full":
        torch.nn.Module.to(exact, torch.float32)  # diffusers' own `to` warns about nothing here
    prefix = f"{part.name}.model." if part.name.startswith("text") else f"{part.name}."
    state = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    with torch.no_grad():
        for name, parameter in exact.named_parameters():
            if name in state:
                parameter.copy_(state.pop(name))
    assert not state, f"weights that the part has not: {sorted(state)[:3]}"
    return exact


def _unet_call(parts: Parts) -> dict[str, Any]:
    """One call of the UNet for comparisons: noise, a timestep in the middle and random text."""
    unet, generator = parts.model.components.unet, torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(1, *parts.model.images.latent_shape, generator=generator),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(
            1, parts.networks.text_length, unet.config.cross_attention_dim, generator=generator
        ),
    }
