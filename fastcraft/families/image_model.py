"""The frozen half of the program: UNet, sampler and VAE as one object that turns text keys into pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcraft.diffusion.decode import decode
from fastcraft.diffusion.text_kv import project_text
from fastcraft.diffusion.unroll import denoise
from fastcraft.memory.plan import KEEP, CheckpointPlan
from fastcraft.records import PromptEmbeds, TextKV, Trajectory


@dataclass(frozen=True, kw_only=True)
class ImageModel:
    """Frozen UNet (prepared by `use_text_kv`) and VAE, with the sampler that drives them.

    ``straight_through_clamp`` changes the gradient, see `decode`. ``on_step`` is called before every denoising step and
    may raise to leave the loop.
    """

    unet: Any
    vae: Any
    sampler: Any
    guidance_scale: float
    latent_shape: tuple[int, int, int]
    device: torch.device
    straight_through_clamp: bool = False
    on_step: Callable[[], None] | None = None

    def text_kv(self, embeds: PromptEmbeds) -> TextKV:
        """Keys and values of every cross-attention layer, once per prompt."""
        return project_text(self.unet, embeds.cond, embeds.uncond)

    def noise(self, seeds: Sequence[int]) -> tuple[Tensor, list[Tensor] | None]:
        """Initial latents ``(B, C, h, w)`` float32, and one more draw per step when the sampler is stochastic.

        Row i depends on ``seeds[i]`` alone, whatever the batch, the rank or the device.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def draw() -> Tensor:
            rows = [torch.randn(self.latent_shape, generator=generator) for generator in generators]
            return torch.stack(rows).to(self.device)

        latents = draw()
        return latents, [draw() for _ in self.sampler.timesteps] if self.sampler.needs_noise else None

    def denoise(
        self,
        latents: Tensor,
        *,
        text_kv: TextKV,
        prefix_kv: TextKV,
        trajectory: Trajectory,
        plan: CheckpointPlan,
        noises: list[Tensor] | None = None,
        start: int = 0,
    ) -> Tensor:
        """See `fastcraft.diffusion.unroll.denoise`."""
        return denoise(
            self.unet,
            latents,
            sampler=self.sampler,
            text_kv=text_kv,
            prefix_kv=prefix_kv,
            guidance_scale=self.guidance_scale,
            trajectory=trajectory,
            plan=plan,
            noises=noises,
            start=start,
            on_step=self.on_step,
        )

    def prefix(
        self, latents: Tensor, *, prefix_kv: TextKV, num_steps: int, noises: list[Tensor] | None = None
    ) -> Tensor:
        """The latents after the first ``num_steps`` steps, without gradient."""
        return self.denoise(
            latents,
            text_kv=prefix_kv,
            prefix_kv=prefix_kv,
            trajectory=Trajectory(num_steps=num_steps),
            plan=CheckpointPlan(steps=()),
            noises=noises,
        )

    def decode(self, latents: Tensor, plan: CheckpointPlan) -> Tensor:
        """See `fastcraft.diffusion.decode.decode`."""
        return decode(self.vae, latents, plan, straight_through=self.straight_through_clamp)

    @torch.no_grad()
    def sample(
        self,
        embeds: PromptEmbeds,
        *,
        seeds: Sequence[int],
        prefix: PromptEmbeds | None = None,
        trained_steps: int = 0,
        decode_micro_batch: int = 0,
    ) -> Tensor:
        """Pictures, without gradient.

        Args:
            embeds: B encoded prompts.
            seeds: B noise seeds.
            prefix: what conditions all but the last ``trained_steps`` steps.
            trained_steps: 0 = ``embeds`` conditions every step. TextCraftor samples with 15 of 25.
            decode_micro_batch: pictures decoded at once; 0 = all.

        Returns:
            ``(B, 3, H, W)`` float32 in [0, 1].
        """
        latents, noises = self.noise(seeds)
        total = len(self.sampler.timesteps)
        steps = tuple(range(total - (trained_steps or total), total))
        text_kv = self.text_kv(embeds)
        latents = self.denoise(
            latents,
            text_kv=text_kv,
            prefix_kv=text_kv if prefix is None else self.text_kv(prefix),
            trajectory=Trajectory(num_steps=total, grad_steps=steps),
            plan=CheckpointPlan(steps=(KEEP,) * len(steps), decode=KEEP),
            noises=noises,
        )
        return self.decode(latents, CheckpointPlan(steps=(), decode=KEEP, decode_micro_batch=decode_micro_batch))
