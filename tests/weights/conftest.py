"""Tiny parts of Stable Diffusion, with adapters that matter."""

import pytest
import torch
from torch import nn

from fastcraft.trained.lora import TEXT_TARGETS, UNET_CONV_TARGETS, inject_lora


def fill_b(model):
    """Give the second factors values: at first they are zero."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def make_lora(make_text_model):
    """A text encoder with adapters, of ours or PEFT's layers."""

    def make(rank=4, alpha=16, *, peft=False, **settings):
        model = make_text_model()
        if not peft:
            inject_lora(model, rank=rank, alpha=alpha, targets=TEXT_TARGETS, **settings)
            return fill_b(model)
        from peft import LoraConfig, inject_adapter_in_model

        return fill_b(
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(TEXT_TARGETS)), model)
        )

    return make


@pytest.fixture(scope="session")
def make_unet():
    """A UNet for text of width 32, the same weights for the same seed."""

    def make(seed=0):
        from diffusers import UNet2DConditionModel

        torch.manual_seed(seed)
        return UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8,
            attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ).eval()  # fmt: skip

    return make


@pytest.fixture
def make_unet_lora(make_unet):
    """The same with adapters on attention, feed-forward and convolutions."""

    def make(rank=2, alpha=8, targets=UNET_CONV_TARGETS):
        unet = make_unet()
        inject_lora(unet, rank=rank, alpha=alpha, targets=targets)
        return fill_b(unet)

    return make


@pytest.fixture(scope="session")
def unet_call():
    """Arguments of one call of such a UNet."""
    generator = torch.Generator().manual_seed(2)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": 300,
        "encoder_hidden_states": torch.randn(2, 7, 32, generator=generator),
    }


@pytest.fixture
def base_pipeline(make_text_model, make_unet, tokenizer_folder, tmp_path):
    """Folder of a Stable Diffusion pipeline made of these parts without adapters."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    vae = AutoencoderKL(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=8,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=16,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=make_text_model(), tokenizer=CLIPTokenizer.from_pretrained(tokenizer_folder),
        unet=make_unet(), scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(scope="session")
def load_pipeline():
    """A pipeline by stock diffusers, quiet."""

    def load(folder, **parts):
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True, **parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load
