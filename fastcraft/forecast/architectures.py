"""Public architecture numbers of the models that a prediction knows by name; configurations only, no weights."""

from collections.abc import Iterable, Mapping
from typing import Any

from fastcraft.errors import UserError
from fastcraft.registry import suggestion

_BLOCKS = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
_VAE: Mapping[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "sample_size": 512,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
_UNET: Mapping[str, Any] = {
    "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "cross_attention_dim": 768,
    "attention_head_dim": 8, "down_block_types": _BLOCKS,
    "up_block_types": tuple(name.replace("Down", "Up") for name in reversed(_BLOCKS)),
}  # fmt: skip


def _text(width: int, layers: int, heads: int, activation: str) -> dict[str, Any]:
    return {
        "vocab_size": 49408, "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "max_position_embeddings": 77, "hidden_act": activation,
    }  # fmt: skip


MODELS: Mapping[str, Mapping[str, Any]] = {
    "sd15": {"unet": _UNET, "vae": _VAE, "text_encoders": [_text(768, 12, 12, "quick_gelu")]},
    "sd21": {
        "unet": {
            **_UNET, "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        "vae": {**_VAE, "sample_size": 768},
        "text_encoders": [_text(1024, 23, 16, "gelu")],
    },
    "sdxl": {  # without the embedding of pooled text and sizes: two linear layers on one row per sample
        "unet": {
            **_UNET, "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        },
        "vae": {**_VAE, "sample_size": 1024},
        "text_encoders": [_text(768, 12, 12, "quick_gelu"), _text(1280, 32, 20, "gelu")],
    },
}  # fmt: skip
"""Stable Diffusion 1.5, 2.1 (768 pixels) and XL 1.0: arguments of diffusers' and transformers' configurations."""


def _vision(width: int, layers: int, heads: int, patch: int, size: int, *, mlp: int, projection: int) -> dict[str, int]:
    return {
        "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
        "patch_size": patch, "image_size": size, "projection_dim": projection,
    }  # fmt: skip


TOWERS: Mapping[str, Mapping[str, int]] = {
    "clip-l": _vision(1024, 24, 16, 14, 224, mlp=4096, projection=768),
    "clip-h": _vision(1280, 32, 16, 14, 224, mlp=5120, projection=1024),
    "clip-g": _vision(1408, 40, 16, 14, 224, mlp=6144, projection=1024),
    "blip-l": _vision(1024, 24, 16, 16, 224, mlp=4096, projection=768),
}
"""Image towers of the published rewards; their text halves, which carry no gradient, are left out."""

REWARD_TOWERS: Mapping[str, tuple[str, str]] = {
    "clip": ("clip-l", "OpenAI CLIP ViT-L/14"),
    "aesthetic": ("clip-l", "OpenAI CLIP ViT-L/14"),
    "pickscore": ("clip-h", "PickScore v1"),
    "hpsv2": ("clip-h", "HPSv2"),
    "hpsv2.1": ("clip-h", "HPSv2.1"),
    "imagereward": ("blip-l", "ImageReward"),
}
"""Reward -> (tower, whose weights): rewards that name the same weights share one run of the tower."""


def towers_of(rewards: Iterable[str]) -> list[Mapping[str, int]]:
    """Vision configurations that a set of published rewards looks through, each once.

    Raises:
        UserError: a reward whose tower is not known.
    """
    used: dict[str, Mapping[str, int]] = {}
    for name in rewards:
        if name not in REWARD_TOWERS:
            raise UserError(f"--rewards: no architecture known for {name!r}{suggestion(name, REWARD_TOWERS)}")
        tower, weights = REWARD_TOWERS[name]
        used[weights] = TOWERS[tower]
    return list(used.values())
