"""Back-propagation of rewards through the last denoising steps into the text encoder.

TextCraftor (Li et al. 2024, arXiv:2403.18978, Alg. 1 and Eq. 6-7) and, as settings of the same loop, AlignProp
(arXiv:2310.03739), DRaFT-K and DRaFT-LV (arXiv:2309.17400), ReFL (arXiv:2304.05977) and DRTune (arXiv:2405.00760).

Deviations from the papers: all of them train the text encoder here, where all but TextCraftor train the UNet; ReFL's
pre-training loss is left out; AlignProp's reward loss is the negative reward, not a distance to a target; of
DRaFT-LV's n draws the first is the trajectory's own last step. PickScore-like rewards are taken on matched pairs only
(the released TextCraftor averages the whole matrix).
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcraft.data.order import sample_seed
from fastcraft.diffusion.conditioning import Conditioning
from fastcraft.diffusion.prefix_store import Prefixes
from fastcraft.families.image_model import ImageModel
from fastcraft.memory.plan import CheckpointPlan
from fastcraft.objectives.backprop_settings import BackpropSettings
from fastcraft.objectives.head import head_first
from fastcraft.objectives.truncation import choose_trajectory
from fastcraft.records import Loss, PromptBatch, PromptEmbeds, RewardOutput, Trajectory
from fastcraft.text.prompt_encoder import By

_TRUNCATION_STREAM = 1
_LOW_VARIANCE_STREAM = 1000  # noise streams of DRaFT-LV's extra draws; stream 0 is the trajectory's own


@dataclass(frozen=True, kw_only=True, slots=True)
class Micro:
    """One micro-batch on its way: ``draw`` is the number of its first sample over all ranks, B its samples."""

    batch: PromptBatch
    seeds: list[int]
    trajectory: Trajectory
    plan: CheckpointPlan
    draw: int


class RewardBackprop:
    """The objective: one update a round, made from one loss per micro-batch.

    Args:
        model: makes pictures.
        rewards: (images (B, 3, H, W) in [0, 1], prompts) -> `RewardOutput`; no score may depend on another image. One
            with a ``statistics`` that is not None also takes ``update_statistics``, as `WeightedRewards`.
        batches: number of a micro-batch's first sample, over all ranks -> this rank's `PromptBatch`.
        samples_per_micro: samples of a micro-batch on all ranks together.
        micro_steps: micro-batches of an update.
        make_plan: number of steps with gradient -> `CheckpointPlan`.
        settings: which method.
        prefix_by: who conditions the steps before the first one with gradient.
        seed: of the run; noise and truncation are functions of it and of the sample's number.
        prefixes: keeps the latents of the frozen steps; only for a prefix by the original encoder that always ends at
            the same step. Its metric ``prefix_reused`` is the share of micro-batches that were found.
    """

    Settings: ClassVar[type] = BackpropSettings
    updates_per_round = 1

    def __init__(
        self,
        model: ImageModel,
        *,
        rewards: Callable[[Tensor, list[str]], RewardOutput],
        batches: Callable[[int], PromptBatch],
        samples_per_micro: int,
        make_plan: Callable[[int], CheckpointPlan],
        settings: BackpropSettings,
        seed: int,
        micro_steps: int = 1,
        prefix_by: By = "original",
        prefixes: Prefixes | None = None,
    ) -> None:
        self.model = model
        self.rewards = rewards
        self.batches = batches
        self.samples_per_micro = samples_per_micro
        self.make_plan = make_plan
        self.settings = settings
        self.seed = seed
        self.micro_steps = micro_steps
        self.prefix_by = prefix_by
        self.prefixes = prefixes
        self.samples_seen = 0

    def round(self, number: int, *, done: int = 0) -> Iterator[Loss]:
        """One update: a loss for each of its micro-batches from ``done`` on."""
        for micro in range(done, self.micro_steps):
            loss, metrics = self.step(self._micro(self.samples_seen + micro * self.samples_per_micro))
            last = micro == self.micro_steps - 1
            yield Loss(loss=loss, metrics=metrics, share=1 / self.micro_steps, closes_update=last)
        self.samples_seen += self.micro_steps * self.samples_per_micro

    def step(self, micro: Micro) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch, and its metrics."""
        model, prompts, first = self.model, micro.batch.prompts, micro.trajectory.grad_steps[0]
        trained = model.encode(prompts, by="trained")
        conditioning = model.condition(trained)
        noise, noises = model.noise(micro.seeds)
        begun, metrics = self._prefix(micro, noise, noises, conditioning)
        latents = model.denoise(
            begun, conditioning, trajectory=micro.trajectory, plan=micro.plan, noises=noises, start=first
        )
        ends = [latents, *self._noised_again(micro, latents, conditioning)]
        loss, scores = self._head(ends, prompts, micro.plan)
        metrics |= {f"reward/{name}": part.detach().mean() for name, part in scores.parts.items()}
        metrics["reward/total"] = scores.total.detach().mean()
        anchor, anchored = self._anchor(trained, prompts)
        return loss if anchor is None else loss + anchor, metrics | anchored

    def state_dict(self) -> dict[str, Tensor]:
        """The number of samples that all updates so far have seen."""
        return {"samples_seen": torch.tensor(self.samples_seen)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state_dict`."""
        self.samples_seen = int(state["samples_seen"])

    def _micro(self, draw: int) -> Micro:
        batch = self.batches(draw)
        trajectory = self._trajectory(draw, batch.indices)
        return Micro(
            batch=batch,
            seeds=[sample_seed(self.seed, index) for index in batch.indices],
            trajectory=trajectory,
            plan=self.make_plan(len(trajectory.grad_steps)),
            draw=draw,
        )

    def _prefix(
        self, micro: Micro, noise: Tensor, noises: list[Tensor] | None, trained: Conditioning
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The latents before the first step with gradient, from the store where there is one; its metric."""
        num_steps, prompts = micro.trajectory.grad_steps[0], micro.batch.prompts

        def make() -> Tensor:
            conditioning = trained.detach() if self.prefix_by == "trained" else self._by_original(prompts)
            return self.model.prefix(noise, conditioning, num_steps=num_steps, noises=noises)

        if self.prefixes is None:
            return make(), {}
        latents, reused = self.prefixes.fetch(prompts, micro.seeds, make)
        device = self.model.device
        return latents.to(device), {"prefix_reused": torch.tensor(float(reused), device=device)}

    def _by_original(self, prompts: list[str]) -> Conditioning:
        with torch.no_grad():
            return self.model.condition(self.model.encode(prompts, by="original"))

    def _noised_again(self, micro: Micro, latents: Tensor, conditioning: Conditioning) -> list[Tensor]:
        """DRaFT-LV: the last step from fresh noisings of where it ended, one for each further draw."""
        ends, last = [], micro.trajectory.num_steps - 1
        for extra in range(1, self.settings.low_variance_draws):
            seeds = [sample_seed(self.seed, index, _LOW_VARIANCE_STREAM + extra) for index in micro.batch.indices]
            noisy = self.model.sampler.add_noise(last, latents.detach(), self.model.noise(seeds)[0])
            noises = self.model.noise(micro.seeds)[1]
            ends.append(
                self.model.denoise(
                    noisy, conditioning, trajectory=micro.trajectory, plan=micro.plan, noises=noises, start=last
                )
            )
        return ends

    def _anchor(self, trained: PromptEmbeds, prompts: list[str]) -> tuple[Tensor | None, dict[str, Tensor]]:
        """What holds the trained embeddings near the original ones, weighted; its metric."""
        if not self.settings.anchor_weight:
            return None, {}
        original = self.model.encode(prompts, by="original")
        distance = F.mse_loss(trained.cond.sequence.float(), original.cond.sequence.float())
        return self.settings.anchor_weight * distance, {"anchor": distance.detach()}

    def _head(self, ends: list[Tensor], prompts: list[str], plan: CheckpointPlan) -> tuple[Tensor, RewardOutput]:
        """The loss over all draws, and the scores of the first one."""
        settings, micro_batch = self.settings, plan.decode_micro_batch
        if 0 < micro_batch < len(prompts):
            share = settings.loss_scale / (len(ends) * len(prompts))
            heads = [
                head_first(
                    end,
                    prompts,
                    decode=lambda latents: self.model.to_images(latents, plan),
                    rewards=self.rewards,
                    loss=lambda total: self._penalty(total).sum() * share,
                    micro_batch=micro_batch,
                )
                for end in ends
            ]
            return torch.stack([head.loss for head in heads]).sum(), heads[0].output
        outputs = [self.rewards(self.model.to_images(end, plan), prompts) for end in ends]
        total = torch.stack([output.total for output in outputs])  # (draws, B)
        return self._penalty(total).mean() * settings.loss_scale, outputs[0]

    def _trajectory(self, draw: int, indices: list[int]) -> Trajectory:
        settings = self.settings
        return choose_trajectory(
            settings.truncation,
            num_inference_steps=len(self.model.sampler),
            backprop_steps=settings.backprop_steps,
            rng=random.Random(sample_seed(self.seed, draw, _TRUNCATION_STREAM)),
            row_rngs=[random.Random(sample_seed(self.seed, index, _TRUNCATION_STREAM)) for index in indices],
            truncation_std=settings.truncation_std,
            early_stop_steps=settings.early_stop_steps,
            input_grad=settings.input_grad,
            uncond_grad=settings.uncond_grad,
        )

    def _penalty(self, total: Tensor) -> Tensor:
        """What each sample adds to the loss; the sign flips here and nowhere else."""
        return F.relu(self.settings.hinge_margin - total) if self.settings.loss == "hinge" else -total
