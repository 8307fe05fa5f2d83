"""Train the denoiser on latents: first on a frozen text encoder, then together with it.

A text encoder that has only learned to tell pictures apart says little about shapes: the pipeline drew the right color
19 times in 20 and the right shape every other time, and a denoiser cannot draw what it is not told.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from fastcraft.shapes.corpus import Corpus
from fastcraft.shapes.fit import FitPlan, fit
from fastcraft.shapes.networks import Scale, build_scheduler, build_unet
from fastcraft.shapes.train_clip import tokenize
from fastcraft.shapes.train_vae import encode_pictures

SEED = 4

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


class DenoisingTask:
    """Batches of noisy latents and the weighted error of a prediction."""

    def __init__(self, latents: Tensor, *, batch: int, device: torch.device) -> None:
        self.latents, self.batch, self.device = latents, batch, device
        scheduler: Any = build_scheduler()
        self.scheduler = scheduler
        signal = scheduler.alphas_cumprod / (1.0 - scheduler.alphas_cumprod)
        self.weights = (signal.clamp(max=MAX_SNR) / signal).to(device)

    def loss(self, predict: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], generator: torch.Generator) -> Tensor:
        """Loss of `predict(noisy, steps, rows, dropped)`; rows tell which captions, dropped which of them to empty."""
        rows = torch.randint(len(self.latents), (self.batch,), generator=generator)
        steps = torch.randint(len(self.weights), (self.batch,), generator=generator)
        noise = torch.randn(self.latents[rows].shape, generator=generator)
        dropped = torch.rand(self.batch, generator=generator) < CAPTION_DROPOUT
        noisy = self.scheduler.add_noise(self.latents[rows], noise, steps)
        noisy = noisy.to(self.device, memory_format=torch.channels_last)
        predicted = predict(noisy, steps.to(self.device), rows, dropped.to(self.device))
        error = (predicted.float() - noise.to(self.device)).square().mean((1, 2, 3))
        return (error * self.weights[steps.to(self.device)]).mean()


class Denoiser(nn.Module):
    """Text encoder and UNet that learn together."""

    def __init__(self, encoder: Any, unet: Any) -> None:
        super().__init__()
        self.encoder, self.unet = encoder, unet


def _task(corpus: Corpus, vae: Any, scale: Scale) -> DenoisingTask:
    latents = encode_pictures(vae, corpus) * vae.config.scaling_factor
    return DenoisingTask(latents, batch=scale.unet_batch, device=vae.device)


def train_unet(
    corpus: Corpus, vae: Any, encoder: Any, tokenizer: CLIPTokenizer, scale: Scale, folder: Path, *, autocast: bool
) -> tuple[UNet2DConditionModel, list[float]]:
    """Predict the noise in the latents of the corpus's pictures, on the autoencoder's device."""
    torch.manual_seed(SEED)
    task = _task(corpus, vae, scale)
    states, empty = encode_captions(encoder, tokenizer, corpus.captions), encode_captions(encoder, tokenizer, [""])
    unet: Any = build_unet(scale)
    unet.to(vae.device, memory_format=torch.channels_last)
    # the fused attention's backward pass is slow on CPUs at these sizes: half of a step's time
    unet.set_attn_processor(AttnProcessor())

    def predict(noisy: Tensor, steps: Tensor, rows: Tensor, dropped: Tensor) -> Tensor:
        text = torch.where(dropped[:, None, None], empty, states[rows.to(states.device)])
        return unet(noisy, steps, text.float()).sample

    plan = FitPlan(
        name="unet", steps=scale.unet_steps, learning_rate=1e-3, seed=SEED, ema_decay=0.998, autocast=autocast
    )
    losses = fit(unet, lambda generator: task.loss(predict, generator), plan, folder)
    unet.set_default_attn_processor()
    return unet, losses


def train_joint(
    corpus: Corpus,
    vae: Any,
    denoiser: Denoiser,
    tokenizer: CLIPTokenizer,
    scale: Scale,
    folder: Path,
    *,
    autocast: bool,
) -> tuple[Denoiser, list[float]]:
    """Go on with the same task, text encoder and UNet together, in place."""
    task = _task(corpus, vae, scale)
    ids, empty = (tokenize(tokenizer, captions).to(vae.device) for captions in (corpus.captions, [""]))
    encoder, unet = denoiser.encoder, denoiser.unet
    encoder.set_attn_implementation("eager")
    unet.set_attn_processor(AttnProcessor())

    def predict(noisy: Tensor, steps: Tensor, rows: Tensor, dropped: Tensor) -> Tensor:
        text = encoder(input_ids=torch.where(dropped[:, None], empty, ids[rows.to(ids.device)])).last_hidden_state
        return unet(noisy, steps, text).sample

    losses: list[float] = []
    for number, cycle in enumerate(scale.joint_cycles):
        plan = FitPlan(
            name=f"joint_{number}",
            steps=cycle.steps,
            horizon=cycle.horizon,
            learning_rate=cycle.learning_rate,
            seed=SEED + 10 * (number + 1),
            ema_decay=0.998,
            autocast=autocast,
        )
        losses += fit(denoiser.requires_grad_(True), lambda generator: task.loss(predict, generator), plan, folder)
    encoder.set_attn_implementation("sdpa")
    unet.set_default_attn_processor()
    return denoiser, losses
