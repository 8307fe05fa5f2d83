"""The networks that a forecast is about: those of a run, or those of a configuration without weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastcraft.families.components import Components, empty_networks, freeze, latent_size
from fastcraft.families.unet import use_text_kv
from fastcraft.records import RewardOutput
from fastcraft.rewards.preprocess import resize_normalize
from fastcraft.text.encoder import TextEncoder
from fastcraft.trained.trained_set import TrainedSet


@dataclass(frozen=True, kw_only=True)
class Networks:
    """What a step runs, with or without contents; ``rewards`` is called with (images, prompts) as `WeightedRewards`."""

    name: str
    unet: Any
    vae: Any
    text_encoders: Sequence[Any]
    rewards: nn.Module
    latent_shape: tuple[int, int, int]
    pixels_per_latent: int
    dtype: torch.dtype
    text_length: int = 77
    text_copies: int = 1
    """Frozen copies of the text encoders from before training, in ``dtype``."""

    num_averaged: Mapping[str, int] = field(default_factory=dict)
    """By part, trained parameters of which an average is kept."""

    @property
    def trains_unet(self) -> bool:
        """Whether a weight of the UNet requires gradient."""
        return any(parameter.requires_grad for parameter in self.unet.parameters())


class TowerRewards(nn.Module):
    """Image towers of published rewards without weights: what they cost, not what they say.

    Args:
        towers: arguments of ``CLIPVisionConfig``, one run each.
        dtype: of the towers.
    """

    def __init__(self, towers: Sequence[Mapping[str, Any]], *, dtype: torch.dtype) -> None:
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        with torch.device("meta"):
            models = [CLIPVisionModelWithProjection(CLIPVisionConfig(**config)) for config in towers]
        self.towers = nn.ModuleList(freeze(model).to(dtype) for model in models)
        self.dtype = dtype

    @property
    def image_networks(self) -> list[nn.Module]:
        """As those of `WeightedRewards`."""
        return [tower.vision_model for tower in self.towers]  # type: ignore[misc]

    def forward(self, images: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """``(B, 3, H, W)`` to a total of ``(B,)`` float32."""
        total = images.mean(dim=(1, 2, 3)) * 0
        for tower in self.towers:
            pixels = resize_normalize(images, tower.config.image_size)  # type: ignore[union-attr, arg-type]
            total = total + tower(pixel_values=pixels.to(self.dtype)).image_embeds.float().sum(dim=-1)
        return RewardOutput(total=total, parts={})


def networks_from_configs(
    name: str, configs: Mapping[str, Any], *, towers: Sequence[Mapping[str, Any]], dtype: torch.dtype,
    resolution: int = 0,
) -> Networks:  # fmt: skip
    """Networks without weights.

    Args:
        name: for people.
        configs: ``unet``, ``vae`` and ``text_encoders``, as `fastcraft.forecast.architectures.MODELS`.
        towers: vision configurations that the rewards look through.
        dtype: of everything frozen.
        resolution: pixels; 0 = the model's own.

    Raises:
        UserError: a resolution that the model cannot have.
    """
    unet, vae, texts = empty_networks(configs["unet"], configs["vae"], configs["text_encoders"], dtype=dtype)
    use_text_kv(unet)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    size = latent_size(resolution, factor, unet.config.sample_size)
    return Networks(
        name=name, unet=unet, vae=vae, text_encoders=[TextEncoder(text) for text in texts],
        rewards=TowerRewards(towers, dtype=dtype), latent_shape=(unet.config.in_channels, size, size),
        pixels_per_latent=factor, dtype=dtype, text_length=texts[0].config.max_position_embeddings,
    )  # fmt: skip


def networks_of(components: Components, trained: TrainedSet, rewards: nn.Module, *, name: str) -> Networks:
    """The networks of a run."""
    text = trained.parts["text"]
    return Networks(
        name=name, unet=components.unet, vae=components.vae, text_encoders=[text.module], rewards=rewards,
        text_copies=int(text.original is not None),
        num_averaged={part.name: sum(p.numel() for _, p in part.parameters()) if part.ema_decay else 0
                      for part in trained.trained_parts()},
        latent_shape=components.latent_shape, pixels_per_latent=components.pixels_per_latent,
        dtype=components.unet.dtype, text_length=components.tokenizer.model_max_length,
    )  # fmt: skip
