"""Weights with open_clip's names as a transformers ``CLIPModel``.

open_clip packs query, key and value into one matrix, keeps its projections transposed and calls everything otherwise;
nothing else differs.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcraft.errors import UserError
from fastcraft.rewards.tensor_files import check_names, filled, read_tensors

OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
HEAD_WIDTHS = {384: 64, 512: 64, 768: 64, 1024: 64, 1280: 80, 1408: 88, 1664: 104}
"""Width of one attention head by width of the image half: ViT-S, M, B, L, H, g, bigG of open_clip."""
TEXT_HEAD_WIDTH = 64

_PLAIN = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_HALVES = {"visual.transformer.resblocks": "vision_model", "transformer.resblocks": "text_model"}
_IGNORED = ("attn_mask",)
"""A causal mask that old checkpoints carry along."""


def load_open_clip(file: Path, *, dtype: torch.dtype, activation: str = "gelu", head_width: int = 0) -> Any:
    """A ``CLIPModel`` in ``dtype`` with the weights of an open_clip file.

    Args:
        file: a .pt, .pth, .bin or .safetensors file with open_clip's names, alone or under ``state_dict``.
        dtype: of the weights; the logit scale stays in float32.
        activation: ``"gelu"``, or ``"quick_gelu"`` for models that OpenAI trained and those made from them. The file
            does not say which.
        head_width: of the image half's attention; 0 = by its width, see `HEAD_WIDTHS`.

    Raises:
        UserError: an unknown option, a file that cannot be read, or names and shapes that are not those of such a
            model; missing and unexpected names are listed.
    """
    from transformers import CLIPModel

    if activation not in ("gelu", "quick_gelu"):
        raise UserError(f"rewards: option activation must be 'gelu' or 'quick_gelu', got {activation!r}")
    if isinstance(head_width, bool) or not isinstance(head_width, int) or head_width < 0:
        raise UserError(f"rewards: option head_width must be a whole number, 0 or above, got {head_width!r}")
    source = str(file)
    tensors = read_tensors(file, reward="open_clip")
    config = _config(tensors, source=source, activation=activation, head_width=head_width)
    converted = convert(tensors)
    model = filled(lambda: CLIPModel(config), converted, dtype=dtype, source=source)
    model.logit_scale.data = converted["logit_scale"].float()
    return model


def convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor under transformers' name; the names must have been checked."""
    result = {}
    for name, tensor in tensors.items():
        half = next((half for half in _HALVES if name.startswith(f"{half}.")), None)
        if name in _PLAIN:
            result[_PLAIN[name]] = tensor
        elif name in _TRANSPOSED:
            result[_TRANSPOSED[name]] = tensor.T
        elif half:
            index, rest = name.removeprefix(f"{half}.").split(".", 1)
            layer = f"{_HALVES[half]}.encoder.layers.{index}"
            if rest.startswith("attn.in_proj_"):
                part = rest.removeprefix("attn.in_proj_")
                for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
                    result[f"{layer}.self_attn.{letter}_proj.{part}"] = rows
            else:
                module, part = rest.rsplit(".", 1)
                result[f"{layer}.{_BLOCK[module]}.{part}"] = tensor
    return result


def _config(tensors: dict[str, Tensor], *, source: str, activation: str, head_width: int) -> Any:
    """The ``CLIPConfig`` that the shapes imply; ignored names are dropped from ``tensors``."""
    from transformers import CLIPConfig

    for name in _IGNORED:
        tensors.pop(name, None)
    num_layers = {half: _num_layers(tensors, half) for half in _HALVES}
    check_names(_names(num_layers), tensors, source=source)
    vision, text = tensors["visual.class_embedding"].numel(), tensors["ln_final.weight"].numel()
    if not head_width:
        if vision not in HEAD_WIDTHS:
            raise UserError(
                f"rewards: {source!r} has an image half {vision} wide: option head_width is needed, "
                f"known widths are {sorted(HEAD_WIDTHS)}"
            )
        head_width = HEAD_WIDTHS[vision]
    for width, head in ((vision, head_width), (text, TEXT_HEAD_WIDTH)):
        if width % head:
            raise UserError(f"rewards: {source!r}: width {width} is no multiple of the head width {head}")
    patch = tensors["visual.conv1.weight"].shape[-1]
    grid = math.isqrt(tensors["visual.positional_embedding"].shape[0] - 1)
    shared = {"hidden_act": activation, "layer_norm_eps": 1e-5}
    vocabulary, length = tensors["token_embedding.weight"].shape[0], tensors["positional_embedding"].shape[0]
    return CLIPConfig(
        projection_dim=tensors["text_projection"].shape[-1],
        vision_config=shared
        | {
            "hidden_size": vision,
            "intermediate_size": tensors["visual.transformer.resblocks.0.mlp.c_fc.bias"].numel(),
            "num_hidden_layers": num_layers["visual.transformer.resblocks"],
            "num_attention_heads": vision // head_width,
            "patch_size": patch,
            "image_size": patch * grid,
        },
        text_config=shared
        | {
            "hidden_size": text,
            "intermediate_size": tensors["transformer.resblocks.0.mlp.c_fc.bias"].numel(),
            "num_hidden_layers": num_layers["transformer.resblocks"],
            "num_attention_heads": text // TEXT_HEAD_WIDTH,
            "vocab_size": vocabulary,
            "max_position_embeddings": length,
            # open_clip pools at the largest id, which ends every text.
            "eos_token_id": vocabulary - 1,
            "bos_token_id": vocabulary - 2,
            "pad_token_id": vocabulary - 1,
        },
    )


def _num_layers(tensors: Mapping[str, Tensor], half: str) -> int:
    """Layers by the largest index; at least one is expected."""
    starts = [name.removeprefix(f"{half}.").split(".")[0] for name in tensors if name.startswith(f"{half}.")]
    return max((int(index) + 1 for index in starts if index.isdecimal()), default=1)


def _names(num_layers: Mapping[str, int]) -> set[str]:
    """Every name of a model with so many layers in each half."""
    parts = [f"{module}.{part}" for module in _BLOCK for part in ("weight", "bias")]
    parts += ["attn.in_proj_weight", "attn.in_proj_bias"]
    blocks = {f"{half}.{i}.{part}" for half, count in num_layers.items() for i in range(count) for part in parts}
    return {*_PLAIN, *_TRANSPOSED, *blocks}
