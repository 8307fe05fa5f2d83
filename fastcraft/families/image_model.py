"""A text-to-image model as an objective sees it: text encoders, denoiser, sampler and VAE behind a handful of calls."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcraft.diffusion.conditioning import Conditioning
from fastcraft.diffusion.decode import decode
from fastcraft.diffusion.network import Network
from fastcraft.diffusion.samplers.grid import Grid
from fastcraft.diffusion.unroll import denoise
from fastcraft.memory.plan import KEEP, CheckpointPlan
from fastcraft.records import PromptEmbeds, Trajectory
from fastcraft.text.prompt_encoder import By, PromptEncoder


@dataclass(frozen=True, kw_only=True)
class ImageModel:
    """Prompts and seeds to pictures, in steps that an objective can take one by one.

    ``text`` may be None where conditionings are made from given embeddings. ``straight_through_clamp`` changes the
    gradient, see `decode`. ``on_step`` is called before every denoising step and may raise to leave the loop.
    """

    text: PromptEncoder | None = None
    network: Network
    vae: Any
    sampler: Grid
    guidance_scale: float
    latent_shape: tuple[int, int, int]
    device: torch.device
    straight_through_clamp: bool = False
    on_step: Callable[[], None] | None = None

    def encode(self, prompts: Sequence[str], *, by: By = "trained") -> PromptEmbeds:
        """Embeddings of B prompts by the trained encoder (with gradient where it is enabled) or the original one."""
        assert self.text is not None, "this model was built without text encoders"
        return self.text.encode(prompts, by=by)

    def condition(self, embeds: PromptEmbeds) -> Conditioning:
        """What the denoiser reads at every step, once per prompt."""
        return self.network.condition(embeds)

    def noise(self, seeds: Sequence[int]) -> tuple[Tensor, list[Tensor] | None]:
        """Standard normal ``(B, C, h, w)`` float32 at the sampler's scale, and a draw per step when it is stochastic.

        Row i depends on ``seeds[i]`` alone, whatever the batch, the rank or the device.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def draw() -> Tensor:
            rows = [torch.randn(self.latent_shape, generator=generator) for generator in generators]
            return torch.stack(rows).to(self.device)

        latents = draw()
        if self.sampler.initial_scale != 1:
            latents = latents * self.sampler.initial_scale
        return latents, [draw() for _ in self.sampler.timesteps] if self.sampler.needs_noise else None

    def prefix(
        self,
        latents: Tensor,
        conditioning: Conditioning,
        *,
        num_steps: int,
        noises: list[Tensor] | None = None,
        start: int = 0,
    ) -> Tensor:
        """The latents after the first ``num_steps`` steps, without gradient."""
        trajectory, plan = Trajectory(num_steps=num_steps), CheckpointPlan(steps=())
        return self.denoise(latents, conditioning, trajectory=trajectory, plan=plan, noises=noises, start=start)

    def denoise(
        self,
        latents: Tensor,
        conditioning: Conditioning,
        *,
        trajectory: Trajectory,
        plan: CheckpointPlan,
        noises: list[Tensor] | None = None,
        start: int = 0,
    ) -> Tensor:
        """See `fastcraft.diffusion.unroll.denoise`."""
        return denoise(
            self.network,
            latents,
            conditioning,
            sampler=self.sampler,
            guidance_scale=self.guidance_scale,
            trajectory=trajectory,
            plan=plan,
            noises=noises,
            start=start,
            on_step=self.on_step,
        )

    def to_images(self, latents: Tensor, plan: CheckpointPlan) -> Tensor:
        """Pictures ``(B, 3, H, W)`` float32 in [0, 1]; see `fastcraft.diffusion.decode.decode`."""
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
        total, first = len(self.sampler), 0
        if prefix is not None and trained_steps:
            first = total - trained_steps
            latents = self.prefix(latents, self.condition(prefix), num_steps=first, noises=noises)
        latents = self.prefix(latents, self.condition(embeds), num_steps=total, noises=noises, start=first)
        return self.to_images(latents, CheckpointPlan(steps=(), decode=KEEP, decode_micro_batch=decode_micro_batch))
