"""An objective over the tiny model."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastcraft.diffusion.samplers.ddim import ddim
from fastcraft.families.image_model import ImageModel
from fastcraft.memory.policies import make_policy
from fastcraft.objectives.reward_backprop import BackpropSettings, RewardBackprop
from fastcraft.records import RewardOutput
from fastcraft.text.encoder import TextEncoder, split_encoders
from fastcraft.text.prompt_encoder import PromptEncoder


def smooth_reward(images: torch.Tensor, prompts: list[str]) -> RewardOutput:
    """Differentiable, own image only, curved."""
    weight = torch.linspace(-1, 1, images[0].numel()).view(images.shape[1:])
    total = (images * weight).flatten(1).sum(1) + images.square().flatten(1).mean(1)
    return RewardOutput(total=total, parts={"smooth": total})


@pytest.fixture
def tiny_objective(tiny_parts: SimpleNamespace) -> Callable[..., tuple[RewardBackprop, TextEncoder]]:
    """``make(prefixes=None, **settings)`` -> (objective, trained encoder, which differs from the original)."""
    components = tiny_parts.components

    def make(*, prefixes: Any = None, **settings: Any) -> tuple[RewardBackprop, TextEncoder]:
        trained, original = split_encoders(components.text_encoder, train="full", dtype=torch.float32)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(7)
            for parameter in trained.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        device = torch.device("cpu")
        text = PromptEncoder(components.tokenizer, trained=trained, original=original, device=device, guided=True)
        model = ImageModel(
            unet=components.unet, vae=components.vae, guidance_scale=3.0, latent_shape=components.latent_shape,
            sampler=ddim(components.schedule, num_inference_steps=4), device=device,
        )  # fmt: skip
        objective = RewardBackprop(
            text, model, rewards=smooth_reward, make_plan=make_policy("none").plan,
            settings=BackpropSettings(**settings), seed=3, prefixes=prefixes,
        )  # fmt: skip
        return objective, trained

    return make
