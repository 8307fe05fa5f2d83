"""Text keys and values, projected once per prompt instead of once per denoising step.

With a frozen UNet the text reaches the image only through the K and V of the cross-attention layers, and these do not
depend on the timestep. Projecting them once is exact; in backward, the gradients of all denoising steps meet in K and V
and go through the projections and the text encoder a single time.
"""

from typing import Any

import torch
from torch import Tensor

from fastcraft.diffusion.attention import CrossAttention, SelfAttention
from fastcraft.errors import UserError
from fastcraft.records import TextKV


def use_text_kv(unet: Any) -> None:
    """Make every attention layer of a diffusers ``UNet2DConditionModel`` take its text as `TextKV`.

    Raises:
        UserError: a layer has a part that these processors do not know (added K/V projections, norms inside).
    """
    processors: dict[str, Any] = {}
    for name in unet.attn_processors:
        layer = unet.get_submodule(name.removesuffix(".processor"))
        for part in ("norm_cross", "group_norm", "spatial_norm", "norm_q", "norm_k", "add_k_proj"):
            if getattr(layer, part, None) is not None:
                raise UserError(
                    f"model.path: attention layer {layer_name(name)!r} has {part!r}, which is not supported"
                )
        processors[name] = CrossAttention(layer_name(name)) if layer.is_cross_attention else SelfAttention()
    if unet.config.get("encoder_hid_dim_type") is not None or unet.config.get("addition_embed_type") is not None:
        raise UserError("model.path: a UNet with added text embeddings (SDXL and relatives) is not supported")
    unet.set_attn_processor(processors)


def layer_name(processor_name: str) -> str:
    """The attention module's name in the UNet."""
    return processor_name.removesuffix(".processor")


def project_text(unet: Any, prompt_embeds: Tensor, uncond_embeds: Tensor | None = None) -> TextKV:
    """Keys and values of every cross-attention layer.

    Args:
        unet: prepared by `use_text_kv`.
        prompt_embeds: ``(B, L, D)``, any float dtype; cast to the UNet's.
        uncond_embeds: ``(1, L, D)`` of the empty prompt, or None when there is no guidance. It is projected once and
            shared by the batch.

    Returns:
        ``TextKV`` for N = 2B samples (unconditional first) or N = B. Fused layers hold the unconditional row once, the
        others a copy for each sample. Where gradients are computed, those that the denoising steps send to fused layers
        meet in float32; a pass of ``torch.autograd.grad`` has to name what the text was made from, not keys or values.
    """
    batch = prompt_embeds.shape[0]
    embeds = prompt_embeds if uncond_embeds is None else torch.cat([uncond_embeds, prompt_embeds])
    embeds = embeds.to(unet.dtype)
    num_samples = batch if uncond_embeds is None else 2 * batch
    layers, sums = {}, {}
    for name, processor in unet.attn_processors.items():
        if isinstance(processor, CrossAttention):
            layer = unet.get_submodule(layer_name(name))
            key, value = layer.to_k(embeds), layer.to_v(embeds)
            key, value, total = processor.prepare(key, value, num_samples=num_samples)
            layers[layer_name(name)] = (key, value)
            if total is not None:
                sums[layer_name(name)] = total
    return TextKV(layers=layers, sums=sums)
