"""Other people's loops, rebuilt from their descriptions, as baselines of the step benchmark.

``published``: TextCraftor (arXiv:2403.18978 and the facts of its released script): float32, with TF32 products on CUDA;
the empty prompt encoded once per sample with gradient; every UNet call projects the text anew; the last K calls wrapped
in non-reentrant checkpoints; the VAE not checkpointed; nothing frozen but the VAE, so UNet and reward weights
accumulate gradients that nobody reads.

``repaired``: the same with everything frozen that is not trained, and the frozen networks in the recipe's dtype.

``alignprop``: AlignProp's loop (arXiv:2310.03739, section 4, and its released script): every one of the T calls is on
the graph and checkpointed; one step per micro-batch is drawn from a normal distribution, and predictions before it are
cut off; the trained encoder conditions all steps; the empty prompt is encoded once, untrained. Its script trains LoRA
on the UNet; here it trains what the others train.
"""

import copy
import random
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastcraft.build.run import Parts

Style = Literal["published", "repaired", "alignprop"]


class PublishedLoop:
    """One optimiser step at a time over stock diffusers and transformers modules.

    Args:
        parts: of the recipe; its models' folder, tokenizer, text encoder and rewards are used, not its UNet and VAE.
        style: see above.
        dtype: of UNet and VAE; the rewards are as they were built.
        guidance_scale: above 1.
        num_inference_steps: T.
        backprop_steps: K.
        spacing: of the timesteps.
    """

    def __init__(
        self, parts: Parts, *, style: Style, dtype: torch.dtype, guidance_scale: float, num_inference_steps: int,
        backprop_steps: int, spacing: str,
    ) -> None:  # fmt: skip
        from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

        components = parts.model.components
        folder, self.device = components.folder, parts.model.images.device
        self.unet: Any = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype).to(self.device)
        self.vae: Any = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype).to(self.device)
        self.scheduler = DDIMScheduler.from_config(
            DDIMScheduler.load_config(folder / "scheduler"), timestep_spacing=spacing, clip_sample=False
        )
        self.scheduler.set_timesteps(num_inference_steps)
        self.style, self.dtype = style, dtype
        self.tokenizer, self.rewards = components.tokenizer, parts.judges.rewards
        self.text_encoder = components.text_encoder
        self.original = copy.deepcopy(self.text_encoder).requires_grad_(False)
        self.guidance_scale, self.backprop_steps = guidance_scale, backprop_steps
        self.vae.requires_grad_(False)
        self.unet.requires_grad_(style == "published")
        self.rewards.requires_grad_(style == "published")
        self.text_encoder.requires_grad_(True)
        self.random = random.Random(0)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
        self.optimizer = torch.optim.AdamW(self.text_encoder.parameters(), lr=1e-6)

    def compile(self) -> None:
        """`torch.compile` the UNet, once its gradient on this device is known to be eager's.

        Raises:
            RuntimeError: the gradients differ by more than rounding.
        """
        size = self.unet.config.sample_size
        inputs = torch.randn(2, self.unet.config.in_channels, size, size, device=self.device, dtype=self.dtype)
        embeds = torch.randn(2, 77, self.unet.config.cross_attention_dim, device=self.device, dtype=self.dtype)
        timestep, compiled, gradients = torch.tensor(500, device=self.device), torch.compile(self.unet), []
        for unet in (self.unet, compiled):
            text = embeds.clone().requires_grad_()
            unet(inputs, timestep, encoder_hidden_states=text).sample.float().square().mean().backward()
            gradients.append(text.grad.float())  # type: ignore[union-attr]
        eager, other = gradients
        error = float((other - eager).norm() / eager.norm())
        if not error < (0.05 if self.dtype == torch.bfloat16 else 1e-3):
            raise RuntimeError(f"the compiled UNet's gradient differs from eager's by {error:.2g} of its norm")
        self.unet = compiled

    def _encode(self, encoder: Any, texts: list[str]) -> Tensor:
        ids = self.tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        with self.autocast:
            return encoder(ids.to(self.device)).last_hidden_state.to(self.dtype)

    def _predict(self, latents: Tensor, timestep: Tensor, embeds: Tensor) -> Tensor:
        inputs = torch.cat([latents, latents]).to(self.dtype)
        uncond, cond = self.unet(inputs, timestep, encoder_hidden_states=embeds).sample.float().chunk(2)
        return uncond + self.guidance_scale * (cond - uncond)

    def step(self, prompts: list[str], latents: Tensor) -> float:
        """One optimiser step; returns the loss."""
        allowed = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            latents = self._alignprop(prompts, latents) if self.style == "alignprop" else self._last(prompts, latents)
            images = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample
            images = (images.float() / 2 + 0.5).clamp(0, 1)
            loss = -self.rewards(images, prompts).total.mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = allowed
        return float(loss.detach())

    def _last(self, prompts: list[str], latents: Tensor) -> Tensor:
        texts = [""] * len(prompts) + prompts
        embeds = self._encode(self.text_encoder, texts)
        with torch.no_grad():
            early = self._encode(self.original, texts)
        first = len(self.scheduler.timesteps) - self.backprop_steps
        for index, timestep in enumerate(self.scheduler.timesteps):
            if index < first:
                with torch.no_grad():
                    noise_pred = self._predict(latents, timestep, early)
            else:
                noise_pred = checkpoint(self._predict, latents, timestep, embeds, use_reentrant=False)
            latents = self.scheduler.step(noise_pred, timestep, latents).prev_sample
        return latents

    def _alignprop(self, prompts: list[str], latents: Tensor) -> Tensor:
        with torch.no_grad():
            uncond = self._encode(self.original, [""])
        embeds = torch.cat([uncond.expand(len(prompts), -1, -1), self._encode(self.text_encoder, prompts)])
        total = len(self.scheduler.timesteps)
        first = min(max(round(self.random.gauss(total - self.backprop_steps, total / 10)), 0), total - 1)
        for index, timestep in enumerate(self.scheduler.timesteps):
            noise_pred = checkpoint(self._predict, latents, timestep, embeds, use_reentrant=False)
            if index < first:
                noise_pred = noise_pred.detach()
            latents = self.scheduler.step(noise_pred, timestep, latents).prev_sample
        return latents
