"""Narrow UNets with the block structure of the released models: random weights, at real head widths."""

from types import SimpleNamespace

import torch


def _sd15():
    """One head a level, so head widths 40, 80 and 160; 1x1 convolutions around the transformers."""
    return {
        "block_out_channels": (40, 80, 160, 160), "attention_head_dim": 1, "layers_per_block": 1,
        "cross_attention_dim": 24, "norm_num_groups": 8,
    }  # fmt: skip


def _sd21():
    """Head width 64, linear projections around the transformers, ``upcast_attention``."""
    return {
        "block_out_channels": (64, 64, 128, 128), "attention_head_dim": (1, 1, 2, 2), "layers_per_block": 1,
        "cross_attention_dim": 24, "norm_num_groups": 16, "use_linear_projection": True, "upcast_attention": True,
    }  # fmt: skip


def _sdxl():
    """Three levels, none with attention at the top, several blocks a transformer, added text and time embeddings."""
    return {
        "block_out_channels": (32, 64, 128), "attention_head_dim": (1, 1, 2), "layers_per_block": 1,
        "transformer_layers_per_block": (1, 1, 2), "cross_attention_dim": 24, "norm_num_groups": 16,
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 20,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip


CONFIGS = {"sd15": _sd15, "sd21": _sd21, "sdxl": _sdxl}


def make_narrow(name):
    """``unet``, frozen and in eval mode; ``arguments`` of (text, pooled text), to call it with."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=8, **CONFIGS[name]()).requires_grad_(False).eval()
    with torch.no_grad():  # a sharper, louder network: gradients to the text well above rounding
        for path, parameter in unet.named_parameters():
            if "attn2" in path and path.endswith("weight"):
                parameter.mul_(3)

    def arguments(text, pooled):
        added = {"text_embeds": pooled, "time_ids": torch.arange(6.0).expand(len(text), -1)}
        return {"encoder_hidden_states": text, "added_cond_kwargs": added if name == "sdxl" else None}

    return SimpleNamespace(name=name, unet=unet, arguments=arguments)


def make_smallest():
    """One level of one head of width 40, frozen and in eval mode: for what takes long on more."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4, block_out_channels=(40,), attention_head_dim=1, layers_per_block=1, cross_attention_dim=8,
        norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    )  # fmt: skip
    return unet.requires_grad_(False).eval()
