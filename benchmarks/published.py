"""The loop of TextCraftor's published script, rebuilt from its description, as the baseline of the step benchmark.

What it does (arXiv:2403.18978 and the facts of its released script): float32, with TF32 products on CUDA; the empty
prompt encoded once per sample with gradient; every UNet call projects the text anew; the last K calls wrapped in
non-reentrant checkpoints; the VAE not checkpointed; nothing frozen but the VAE, so UNet and reward weights accumulate
gradients that nobody reads. ``repaired`` is the same loop with everything frozen that is not trained.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastcraft.rewards.mix import WeightedRewards


class PublishedLoop:
    """One optimiser step at a time over stock diffusers and transformers modules.

    Args:
        unet, vae, text_encoder, original, tokenizer: stock modules; ``original`` is a frozen copy of the encoder.
        scheduler: a diffusers ``DDIMScheduler`` with its timesteps set.
        rewards: the same mix that fastcraft scores with.
        repaired: freeze the UNet and the rewards.
        autocast: dtype of the arithmetic, for a row that differs from fastcraft's in method and not in dtype.
    """

    def __init__(
        self,
        *,
        unet: Any,
        vae: Any,
        text_encoder: Any,
        original: Any,
        tokenizer: Any,
        scheduler: Any,
        rewards: WeightedRewards,
        guidance_scale: float,
        backprop_steps: int,
        latent_shape: tuple[int, ...],
        repaired: bool,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.unet, self.vae, self.tokenizer, self.scheduler = unet, vae, tokenizer, scheduler
        self.text_encoder, self.original, self.rewards = text_encoder, original, rewards
        self.guidance_scale, self.backprop_steps, self.latent_shape = guidance_scale, backprop_steps, latent_shape
        vae.requires_grad_(False)
        unet.requires_grad_(not repaired)
        rewards.requires_grad_(not repaired)
        text_encoder.requires_grad_(True)
        self.device = next(unet.parameters()).device
        self.autocast = torch.autocast(self.device.type, autocast or torch.bfloat16, enabled=autocast is not None)
        self.optimizer = torch.optim.AdamW(text_encoder.parameters(), lr=1e-6)

    def _encode(self, encoder: Any, prompts: list[str]) -> Tensor:
        texts = [""] * len(prompts) + prompts
        ids = self.tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        return encoder(ids.to(self.device)).last_hidden_state

    def _predict(self, latents: Tensor, timestep: Tensor, embeds: Tensor) -> Tensor:
        output = self.unet(torch.cat([latents, latents]), timestep, encoder_hidden_states=embeds).sample
        uncond, cond = output.chunk(2)
        return uncond + self.guidance_scale * (cond - uncond)

    def step(self, prompts: list[str], latents: Tensor) -> float:
        """One optimiser step; returns the loss."""
        allowed = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            with self.autocast:
                loss = self._loss(prompts, latents)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = allowed
        return float(loss.detach())

    def _loss(self, prompts: list[str], latents: Tensor) -> Tensor:
        embeds = self._encode(self.text_encoder, prompts)
        with torch.no_grad():
            early = self._encode(self.original, prompts)
        first = len(self.scheduler.timesteps) - self.backprop_steps
        for index, timestep in enumerate(self.scheduler.timesteps):
            if index < first:
                with torch.no_grad():
                    noise_pred = self._predict(latents, timestep, early)
            else:
                noise_pred = checkpoint(self._predict, latents, timestep, embeds, use_reentrant=False)
            latents = self.scheduler.step(noise_pred, timestep, latents).prev_sample
        images = (self.vae.decode(latents / self.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        return -self.rewards(images.float(), prompts).total.mean()
