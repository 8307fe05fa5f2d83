"""Train the autoencoder: colorful pixels count more, and the latents are pulled gently towards a unit normal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from fastcraft.shapes.corpus import Corpus
from fastcraft.shapes.fit import FitPlan, fit
from fastcraft.shapes.networks import Scale, VaePhase, build_vae

KL_WEIGHT = 1e-4

COLOR_WEIGHT = 6.0
"""How much more a pixel of full color counts than a gray one. Objects are small: without this they come out gray."""

CROP = 32
"""Side of the crops in pixels."""

FIRST_LOG_VARIANCE = -6.0
"""Of the posterior, at the start. From the default of 0 the decoder sees little but noise for hundreds of steps."""


def _colorfulness(pictures: Tensor) -> Tensor:
    return pictures.amax(1, keepdim=True) - pictures.amin(1, keepdim=True)


def crop(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """One square of `CROP` pixels from each of (B, 3, H, W) pictures, around a pixel drawn by its color."""
    size = pictures.shape[-1]
    chances = _colorfulness(pictures).flatten(1) + 1e-3
    centers = torch.multinomial(chances, 1, generator=generator)[:, 0]
    shift = torch.randint(-CROP // 4, CROP // 4 + 1, (2, len(pictures)), generator=generator)
    tops = (centers // size - CROP // 2 + shift[0]).clamp(0, size - CROP).tolist()
    lefts = (centers % size - CROP // 2 + shift[1]).clamp(0, size - CROP).tolist()
    places = zip(pictures, tops, lefts, strict=True)
    return torch.stack([picture[:, top : top + CROP, left : left + CROP] for picture, top, left in places])


def _error(vae: Any, pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Training loss of (B, 3, H, W) pictures in [0, 1]."""
    pictures = pictures.to(vae.device, memory_format=torch.channels_last)
    weight = 1.0 + COLOR_WEIGHT * _colorfulness(pictures)
    images = pictures * 2.0 - 1.0
    posterior = vae.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(vae.device)
    error = vae.decode(posterior.mean + posterior.std * noise).sample - images
    error = (weight * (error.abs() + error.square())).mean()
    return error + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()


def train_vae(
    corpus: Corpus, scale: Scale, folder: Path, *, device: str, seed: int = 1
) -> tuple[AutoencoderKL, list[float]]:
    """Train on the corpus's pictures and set `scaling_factor` to one over the latents' standard deviation.

    Whole pictures first, then crops around objects, then whole pictures again.
    """
    torch.manual_seed(seed)
    vae: Any = build_vae(scale)
    with torch.no_grad():
        half = vae.config.latent_channels
        vae.quant_conv.weight[half:] = 0.0
        vae.quant_conv.bias[half:] = FIRST_LOG_VARIANCE
    vae = vae.to(device, memory_format=torch.channels_last)

    losses: list[float] = []
    for index, phase in enumerate(scale.vae_phases):

        def loss_at(generator: torch.Generator, phase: VaePhase = phase) -> Tensor:
            pictures = corpus.batch(torch.randint(len(corpus.captions), (phase.batch,), generator=generator))
            return _error(vae, crop(pictures, generator) if phase.is_cropped else pictures, generator)

        plan = FitPlan(
            name=phase.name,
            steps=phase.steps,
            horizon=phase.horizon,
            learning_rate=phase.learning_rate,
            seed=seed + 10 * index,
            weight_decay=0.0,
            ema_decay=0.99,
        )
        losses += fit(vae.requires_grad_(True), loss_at, plan, folder)
    latents = encode_pictures(vae, corpus, limit=2000)
    vae.register_to_config(scaling_factor=round(1.0 / float(latents.std()), 5))
    return vae, losses


@torch.no_grad()
def encode_pictures(vae: Any, corpus: Corpus, *, limit: int | None = None, batch: int = 100) -> Tensor:
    """Means of the latents, (N, 4, 8, 8) float32 on the CPU, not yet scaled."""
    count = min(limit or len(corpus.captions), len(corpus.captions))
    parts = []
    for start in range(0, count, batch):
        images = corpus.batch(torch.arange(start, min(start + batch, count))) * 2.0 - 1.0
        images = images.to(vae.device, memory_format=torch.channels_last)
        parts.append(vae.encode(images).latent_dist.mean.float().cpu())
    return torch.cat(parts)
