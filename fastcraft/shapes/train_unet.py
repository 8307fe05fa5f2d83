"""Train the denoiser on latents, conditioned on a frozen text encoder."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from fastcraft.shapes.corpus import Corpus
from fastcraft.shapes.fit import FitPlan, fit
from fastcraft.shapes.networks import Scale, build_scheduler, build_unet
from fastcraft.shapes.train_clip import tokenize
from fastcraft.shapes.train_vae import encode_pictures

CAPTION_DROPOUT = 0.1
"""Share of training captions replaced by the empty one, for classifier-free guidance."""

MAX_SNR = 5.0
"""Min-SNR weighting, arXiv:2303.09556: no timestep counts more than one with this signal-to-noise ratio."""


@torch.no_grad()
def encode_captions(encoder: CLIPTextModel, tokenizer: CLIPTokenizer, captions: list[str], batch: int = 500) -> Tensor:
    """Hidden states (N, 77, D) bfloat16, on the encoder's device."""
    ids = tokenize(tokenizer, captions)
    states = torch.empty(*ids.shape, encoder.config.hidden_size, dtype=torch.bfloat16, device=encoder.device)
    for start in range(0, len(ids), batch):
        part = ids[start : start + batch].to(encoder.device)
        states[start : start + batch] = encoder(input_ids=part).last_hidden_state
    return states


def train_unet(
    corpus: Corpus,
    vae: AutoencoderKL,
    encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    scale: Scale,
    folder: Path,
    *,
    autocast: bool,
    seed: int = 4,
) -> tuple[UNet2DConditionModel, list[float]]:
    """Predict the noise in the latents of the corpus's pictures, on the autoencoder's device."""
    torch.manual_seed(seed)
    device = vae.device
    latents = encode_pictures(vae, corpus) * vae.config.scaling_factor
    states, empty = encode_captions(encoder, tokenizer, corpus.captions), encode_captions(encoder, tokenizer, [""])
    unet = build_unet(scale).to(device, memory_format=torch.channels_last)
    # the fused attention's backward pass is slow on CPUs at these sizes: half of a step's time
    unet.set_attn_processor(AttnProcessor())
    scheduler = build_scheduler()
    signal = scheduler.alphas_cumprod / (1.0 - scheduler.alphas_cumprod)
    weights = (signal.clamp(max=MAX_SNR) / signal).to(device)

    def loss_at(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (scale.unet_batch,), generator=generator)
        steps = torch.randint(len(signal), (scale.unet_batch,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        dropped = torch.rand(scale.unet_batch, generator=generator) < CAPTION_DROPOUT
        noisy = scheduler.add_noise(latents[rows], noise, steps).to(device, memory_format=torch.channels_last)
        text = torch.where(dropped[:, None, None].to(device), empty, states[rows.to(device)]).float()
        predicted = unet(noisy, steps.to(device), text).sample
        error = (predicted.float() - noise.to(device)).square().mean((1, 2, 3))
        return (error * weights[steps.to(device)]).mean()

    plan = FitPlan(
        name="unet", steps=scale.unet_steps, learning_rate=1e-3, seed=seed, ema_decay=0.998, autocast=autocast
    )
    losses = fit(unet, loss_at, plan, folder)
    unet.set_default_attn_processor()
    return unet, losses
