"""ImageReward's weights as transformers' BLIP classes.

The file has the names of the original BLIP code: a ViT of timm's and a BERT with cross-attention.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcraft.errors import UserError
from fastcraft.rewards.affine_head import HEAD_NAMES, AffineHead, collapse
from fastcraft.rewards.tensor_files import filled, read_tensors, some

HEAD_WIDTH = 64
"""Of the attention in both halves: 1024 features in 16 heads, 768 in 12."""
_VISION, _TEXT, _HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp."
_IGNORED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
"""Of BLIP's contrastive pretraining, and a table of numbers 0, 1, 2, ...: neither takes part in the score."""
_VISION_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
_BLOCK_NAMES = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_NEEDED = (
    "blip.visual_encoder.cls_token", "blip.visual_encoder.pos_embed", "blip.visual_encoder.patch_embed.proj.weight",
    "blip.visual_encoder.blocks.0.mlp.fc1.weight", "blip.text_encoder.embeddings.word_embeddings.weight",
    "blip.text_encoder.embeddings.position_embeddings.weight",
    "blip.text_encoder.encoder.layer.0.crossattention.self.key.weight",
    "blip.text_encoder.encoder.layer.0.intermediate.dense.weight",
)  # fmt: skip
"""Whose shapes say what the model is."""


def load_blip(file: Path, *, dtype: torch.dtype) -> tuple[Any, Any, AffineHead]:
    """The image half (``BlipVisionModel``), the text half (``BlipTextModel``) and the head of an ImageReward file.

    Args:
        file: with the names of ``ImageReward.pt``; sizes are read off the shapes, heads are 64 wide.
        dtype: of both halves; the head is float32.

    Raises:
        UserError: not readable, or names and shapes that are not those of such a model; missing and unexpected names
            are listed.
    """
    from transformers import BlipTextModel, BlipVisionModel

    source = str(file)
    tensors = {
        name: tensor
        for name, tensor in read_tensors(file, reward="imagereward").items()
        if not name.startswith(_IGNORED)
    }
    foreign = [name for name in tensors if not name.startswith((_VISION, _TEXT, _HEAD))]
    missing = (set(_NEEDED) | {_HEAD + name for name in HEAD_NAMES}) - set(tensors)
    if foreign or missing:
        raise UserError(
            f"rewards: {source!r} does not hold exactly the weights of the model; "
            f"missing: {some(missing) or 'none'}; unexpected: {some(foreign) or 'none'}"
        )
    vision_config, text_config = _configs(tensors, source=source)
    vision = filled(
        lambda: BlipVisionModel(vision_config), _renamed(_part(tensors, _VISION)), dtype=dtype, source=source
    )
    text = filled(
        lambda: BlipTextModel(text_config, add_pooling_layer=False), _part(tensors, _TEXT), dtype=dtype, source=source
    )
    return vision, text, collapse(_part(tensors, _HEAD), source=source)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image half under transformers' names; what has none keeps its own and is refused when filled in."""
    result = {}
    for name, tensor in tensors.items():
        new = _VISION_NAMES.get(name, name)
        if name.startswith("blocks.") and name.count(".") >= 3:
            _, index, rest = name.split(".", 2)
            module, part = rest.rsplit(".", 1)
            new = f"encoder.layers.{index}.{_BLOCK_NAMES.get(module, module)}.{part}"
        result[new] = tensor
    return result


def _configs(tensors: Mapping[str, Tensor], *, source: str) -> tuple[Any, Any]:
    """``BlipVisionConfig`` and ``BlipTextConfig`` that the shapes imply."""
    from transformers import BlipTextConfig, BlipVisionConfig

    width = tensors[_VISION + "cls_token"].shape[-1]
    words, text_width = tensors[_TEXT + "embeddings.word_embeddings.weight"].shape
    for size in (width, text_width):
        if size % HEAD_WIDTH:
            raise UserError(f"rewards: {source!r}: width {size} is no multiple of the head width {HEAD_WIDTH}")
    patch = tensors[_VISION + "patch_embed.proj.weight"].shape[-1]
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=tensors[_VISION + "blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_num_layers(tensors, _VISION + "blocks."),
        num_attention_heads=width // HEAD_WIDTH,
        patch_size=patch,
        image_size=patch * math.isqrt(tensors[_VISION + "pos_embed"].shape[1] - 1),
        layer_norm_eps=1e-6,  # the original's, not transformers' default
    )
    text = BlipTextConfig(
        vocab_size=words,
        hidden_size=text_width,
        encoder_hidden_size=tensors[_TEXT + "encoder.layer.0.crossattention.self.key.weight"].shape[-1],
        intermediate_size=tensors[_TEXT + "encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_num_layers(tensors, _TEXT + "encoder.layer."),
        num_attention_heads=text_width // HEAD_WIDTH,
        max_position_embeddings=tensors[_TEXT + "embeddings.position_embeddings.weight"].shape[0],
        is_decoder=True,  # builds the cross-attention; the mask is two-sided all the same
    )
    return vision, text


def _num_layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    indices = [name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)]
    return max(int(index) for index in indices if index.isdecimal()) + 1
