"""The networks of the miniature world, as stock diffusers and transformers classes, in a tiny and a full size."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from fastcraft.shapes.scenes import IMAGE_SIZE


@dataclass(frozen=True, kw_only=True, slots=True)
class VaePhase:
    """One stretch of the autoencoder's training."""

    name: str
    steps: int
    batch: int
    is_cropped: bool
    """Crops around objects show four times as many edges in the same time, but set the normalisation layers askew."""
    learning_rate: float = 2e-3
    horizon: int | None = None
    """Steps after which the cosine schedule would reach its end; None: `steps`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cycle:
    """One stretch of another network's training, with a learning rate that rises and falls once."""

    steps: int
    learning_rate: float = 1e-3
    """At its peak."""
    horizon: int | None = None
    """As in `VaePhase`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Sizes of networks and lengths of their training. B x steps samples are seen by each network."""

    vae_channels: tuple[int, ...] = (16, 32, 64, 64)
    unet_channels: tuple[int, ...] = (80, 160)
    clip_width: int = 128
    clip_layers: int = 4
    num_pictures: int = 60_000
    """Rendered pictures, each with one caption, that are drawn once and used by every stage."""
    vae_phases: tuple[VaePhase, ...] = (
        VaePhase(name="vae", steps=1_250, horizon=1_800, batch=16, is_cropped=False),
        VaePhase(name="vae_objects", steps=1_000, horizon=2_600, batch=48, is_cropped=True),
        VaePhase(name="vae_details", steps=5_000, batch=16, is_cropped=True, learning_rate=1.5e-3),
        VaePhase(name="vae_whole", steps=400, batch=16, is_cropped=False, learning_rate=6e-4),
    )
    clip_steps: int = 900
    clip_batch: int = 192
    reward_cycles: tuple[Cycle, ...] = (Cycle(steps=900), Cycle(steps=2_000), Cycle(steps=2_000))
    reward_batch: int = 128
    unet_steps: int = 5_000
    """On the frozen text encoder."""
    joint_cycles: tuple[Cycle, ...] = (Cycle(steps=600, learning_rate=5e-4), Cycle(steps=2_250, horizon=6_000))
    """Together with the text encoder. After 4,000 steps of the second cycle, 47 % of two-object captions come out right
    instead of 32 %, and what still fails then is mostly relations, which the reward CLIP cannot read."""
    unet_batch: int = 64


SCALES = {
    "full": Scale(),
    "tiny": Scale(
        vae_channels=(8, 8, 16, 16), unet_channels=(16, 32), clip_width=32, clip_layers=2, num_pictures=256,
        vae_phases=(
            VaePhase(name="vae", steps=8, batch=8, is_cropped=False),
            VaePhase(name="vae_details", steps=4, batch=8, is_cropped=True),
        ),
        clip_steps=12, clip_batch=32, reward_cycles=(Cycle(steps=8), Cycle(steps=4)), reward_batch=16,
        unet_steps=12, joint_cycles=(Cycle(steps=4), Cycle(steps=2)), unet_batch=16,
    ),
}  # fmt: skip


def build_vae(scale: Scale) -> AutoencoderKL:
    """64x64x3 pictures to 8x8x4 latents and back. Its top level is thin: that is where the time goes."""
    levels = len(scale.vae_channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=scale.vae_channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,
    )


def build_unet(scale: Scale) -> UNet2DConditionModel:
    """The denoiser: two levels, self- and cross-attention at both, head count written as Stable Diffusion 1 does."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=scale.unet_channels,
        layers_per_block=1,
        cross_attention_dim=scale.clip_width,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_clip(scale: Scale, tokenizer: CLIPTokenizer, *, patch_size: int) -> CLIPModel:
    """A CLIP of square patches of so many pixels. Its text half can serve as the text encoder of the pipeline."""
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    shared = {
        "hidden_size": scale.clip_width,
        "intermediate_size": 4 * scale.clip_width,
        "num_hidden_layers": scale.clip_layers,
        "num_attention_heads": 4,
        "projection_dim": scale.clip_width,
    }
    text = {**shared, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    vision = {**shared, "image_size": IMAGE_SIZE, "patch_size": patch_size}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=scale.clip_width))


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.5's noise schedule."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )
