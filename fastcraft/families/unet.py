"""diffusers' ``UNet2DConditionModel`` as a `Network`: text keys and values are projected once per prompt.

The text reaches the image only through the K and V of the cross-attention layers, and these do not depend on the
timestep. Projecting them once instead of at every denoising step is exact, also where the projections are trained; in
backward, the gradients of all steps meet in K and V and go through projections and text encoder a single time.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcraft.diffusion.attention import CrossAttention, SelfAttention
from fastcraft.diffusion.conditioning import Conditioning
from fastcraft.errors import UserError
from fastcraft.records import PromptEmbeds


def use_text_kv(unet: Any) -> None:
    """Make every attention layer of a diffusers ``UNet2DConditionModel`` take its text as `Conditioning`.

    Raises:
        UserError: a layer has a part that these processors do not know (added K/V projections, norms inside).
    """
    processors: dict[str, Any] = {}
    for name in unet.attn_processors:
        layer = unet.get_submodule(name.removesuffix(".processor"))
        for part in ("norm_cross", "group_norm", "spatial_norm", "norm_q", "norm_k", "add_k_proj"):
            if getattr(layer, part, None) is not None:
                raise UserError(f"path: attention layer {layer_name(name)!r} has {part!r}, which is not supported")
        processors[name] = CrossAttention(layer_name(name)) if layer.is_cross_attention else SelfAttention()
    if unet.config.get("encoder_hid_dim_type") is not None or unet.config.get("addition_embed_type") is not None:
        raise UserError("path: a UNet with added text embeddings (SDXL and relatives) is not supported")
    unet.set_attn_processor(processors)


def layer_name(processor_name: str) -> str:
    """The attention module's name in the UNet."""
    return processor_name.removesuffix(".processor")


@dataclass(frozen=True, kw_only=True)
class UNetNetwork:
    """A UNet prepared by `use_text_kv`, or what stands for it (`fastcraft.diffusion.acceleration`)."""

    module: Any

    def using(self, module: Any) -> "UNetNetwork":
        """The same with another UNet in its place."""
        return UNetNetwork(module=module)

    def condition(self, prompts: PromptEmbeds) -> Conditioning:
        """Keys and values of every cross-attention layer.

        Args:
            prompts: sequences ``(B, L, D)`` and, with guidance, ``(1, L, D)``, any float dtype; cast to the UNet's. The
                empty prompt is projected once and shared by the batch.

        Returns:
            For N = 2B samples (unconditional first) or N = B. Fused layers hold the unconditional row once, the others
            a copy for each sample. Where gradients are computed, those that the denoising steps send to fused layers
            meet in float32; a pass of ``torch.autograd.grad`` has to name what the text was made from, not keys or
            values.
        """
        embeds = prompts.cond.sequence
        num_samples = len(embeds)
        if prompts.uncond is not None:
            embeds, num_samples = torch.cat([prompts.uncond.sequence, embeds]), 2 * num_samples
        embeds = embeds.to(self.module.dtype)
        layers, sums = {}, {}
        for name, processor in self.module.attn_processors.items():
            if isinstance(processor, CrossAttention):
                layer = self.module.get_submodule(layer_name(name))
                key, value = layer.to_k(embeds), layer.to_v(embeds)
                key, value, total = processor.prepare(key, value, num_samples=num_samples)
                layers[layer_name(name)] = (key, value)
                if total is not None:
                    sums[layer_name(name)] = total
        return Conditioning(layers=layers, sums=sums)

    def predict(self, latents: Tensor, time: Tensor, conditioning: Conditioning, *, guided: bool) -> Tensor:
        """See `fastcraft.diffusion.network.Network`."""
        inputs = torch.cat([latents, latents]) if guided else latents
        if guided and time.ndim:
            time = torch.cat([time, time])
        output: Tensor = self.module(
            inputs.to(self.module.dtype),
            time,
            encoder_hidden_states=None,
            cross_attention_kwargs={"conditioning": conditioning},
            return_dict=False,
        )[0]
        return output
