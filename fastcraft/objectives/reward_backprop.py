"""Back-propagation of rewards through the last denoising steps into the text encoder.

TextCraftor (Li et al. 2024, arXiv:2403.18978, Alg. 1 and Eq. 6-7) and, as settings of the same loop, AlignProp
(arXiv:2310.03739), DRaFT-K and DRaFT-LV (arXiv:2309.17400), ReFL (arXiv:2304.05977) and DRTune (arXiv:2405.00760).

Deviations from the papers: all of them train the text encoder here, where all but TextCraftor train the UNet; ReFL's
pre-training loss is left out; AlignProp's reward loss is the negative reward, not a distance to a target; of
DRaFT-LV's n draws the first is the trajectory's own last step. PickScore-like rewards are taken on matched pairs only
(the released TextCraftor averages the whole matrix).
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcraft.data.order import sample_seed
from fastcraft.diffusion.prefix_store import Prefixes
from fastcraft.families.image_model import ImageModel
from fastcraft.memory.plan import CheckpointPlan
from fastcraft.objectives.head import head_first
from fastcraft.objectives.truncation import choose_trajectory
from fastcraft.records import LossOutput, PromptBatch, PromptEmbeds, RewardOutput, TextKV, Trajectory
from fastcraft.text.prompt_encoder import PromptEncoder

_TRUNCATION_STREAM = 1
_LOW_VARIANCE_STREAM = 1000  # noise streams of DRaFT-LV's extra draws; stream 0 is the trajectory's own


@dataclass(frozen=True, kw_only=True, slots=True)
class BackpropSettings:
    """What tells the methods apart; meanings as in `fastcraft.recipe.ObjectiveConfig`."""

    backprop_steps: int = 5
    truncation: str = "last"
    truncation_std: float = 0.0
    early_stop_steps: int = 0
    input_grad: bool = True
    uncond_grad: bool = True
    prefix_encoder: str = "original"
    low_variance_draws: int = 1
    loss: str = "negative_reward"
    hinge_margin: float = 2.0
    loss_scale: float = 1.0
    anchor_weight: float = 0.0


class RewardBackprop:
    """The objective: prompts in, one loss out.

    Args:
        text: encodes prompts.
        model: makes pictures.
        rewards: (images (B, 3, H, W) in [0, 1], prompts) -> `RewardOutput`; no score may depend on another image. One
            with a ``statistics`` that is not None also takes ``update_statistics``, as `WeightedRewards`.
        make_plan: number of steps with gradient -> `CheckpointPlan`.
        settings: which method.
        seed: of the run; noise and truncation are functions of it and of the sample's number.
        prefixes: keeps the latents of the frozen steps; only for a prefix by the original encoder that always ends at
            the same step. Its metric ``prefix_reused`` is the share of micro-batches that were found.
    """

    def __init__(
        self,
        text: PromptEncoder,
        model: ImageModel,
        *,
        rewards: Callable[[Tensor, list[str]], RewardOutput],
        make_plan: Callable[[int], CheckpointPlan],
        settings: BackpropSettings,
        seed: int,
        prefixes: Prefixes | None = None,
    ) -> None:
        self.text = text
        self.model = model
        self.rewards = rewards
        self.make_plan = make_plan
        self.settings = settings
        self.seed = seed
        self.prefixes = prefixes

    def losses(self, batch: PromptBatch, *, draw: int) -> Iterator[LossOutput]:
        """One loss per micro-batch.

        Args:
            batch: B prompts with their sample numbers.
            draw: number of the micro-step's first sample, the same on every rank: seeds a truncation that the
                micro-batch shares.
        """
        settings, prompts = self.settings, batch.prompts
        trajectory = self._trajectory(draw, batch.indices)
        plan = self.make_plan(len(trajectory.grad_steps))
        trained = self.text.trained(prompts)
        original = self.text.original(prompts) if settings.anchor_weight else None
        text_kv = self.model.text_kv(trained)
        seeds = [sample_seed(self.seed, index) for index in batch.indices]
        latents, noises = self.model.noise(seeds)
        first, last = trajectory.grad_steps[0], trajectory.num_steps - 1

        def prefix() -> Tensor:
            kv = self._original_kv(prompts, original) if settings.prefix_encoder == "original" else text_kv.detach()
            return self.model.prefix(latents, prefix_kv=kv, num_steps=first, noises=noises)

        finish = partial(
            self.model.denoise, text_kv=text_kv, prefix_kv=text_kv, trajectory=trajectory, plan=plan, noises=noises
        )
        begun, metrics = self._begin(prompts, seeds, prefix)
        ends = [finish(begun, start=first)]
        for extra in range(1, settings.low_variance_draws):
            fresh = [sample_seed(self.seed, index, _LOW_VARIANCE_STREAM + extra) for index in batch.indices]
            noisy = self.model.sampler.add_noise(last, ends[0].detach(), self.model.noise(fresh)[0])
            ends.append(finish(noisy, start=last))

        loss, scores = self._head(ends, prompts, plan)
        metrics |= {f"reward/{name}": part.detach().mean() for name, part in scores.parts.items()}
        metrics["reward/total"] = scores.total.detach().mean()
        if original is not None:
            anchor = F.mse_loss(trained.cond.float(), original.cond.float())
            metrics["anchor"] = anchor.detach()
            loss = loss + settings.anchor_weight * anchor
        yield LossOutput(loss=loss, metrics=metrics)

    def _begin(
        self, prompts: list[str], seeds: list[int], prefix: Callable[[], Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The latents before the first step with gradient, from the store where there is one; its metric."""
        if self.prefixes is None:
            return prefix(), {}
        latents, reused = self.prefixes.fetch(prompts, seeds, prefix)
        device = self.model.device
        return latents.to(device), {"prefix_reused": torch.tensor(float(reused), device=device)}

    def _original_kv(self, prompts: list[str], original: PromptEmbeds | None) -> TextKV:
        with torch.no_grad():
            return self.model.text_kv(self.text.original(prompts) if original is None else original)

    def _head(self, ends: list[Tensor], prompts: list[str], plan: CheckpointPlan) -> tuple[Tensor, RewardOutput]:
        """The loss over all draws, and the scores of the first one."""
        settings, micro_batch = self.settings, plan.decode_micro_batch
        if 0 < micro_batch < len(prompts):
            share = settings.loss_scale / (len(ends) * len(prompts))
            heads = [
                head_first(
                    end,
                    prompts,
                    decode=lambda latents: self.model.decode(latents, plan),
                    rewards=self.rewards,
                    loss=lambda total: self._penalty(total).sum() * share,
                    micro_batch=micro_batch,
                )
                for end in ends
            ]
            return torch.stack([head.loss for head in heads]).sum(), heads[0].output
        outputs = [self.rewards(self.model.decode(end, plan), prompts) for end in ends]
        total = torch.stack([output.total for output in outputs])  # (draws, B)
        return self._penalty(total).mean() * settings.loss_scale, outputs[0]

    def _trajectory(self, draw: int, indices: list[int]) -> Trajectory:
        settings = self.settings
        return choose_trajectory(
            settings.truncation,
            num_inference_steps=len(self.model.sampler.timesteps),
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
