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

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcraft.data.order import sample_seed
from fastcraft.diffusion.image_model import ImageModel
from fastcraft.objectives.truncation import choose_trajectory
from fastcraft.records import CheckpointPlan, LossOutput, PromptBatch, RewardOutput, Trajectory
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
        rewards: (images (B, 3, H, W) in [0, 1], prompts) -> `RewardOutput`.
        make_plan: number of steps with gradient -> `CheckpointPlan`.
        settings: which method.
        seed: of the run; noise and truncation are functions of it and of the sample's number.
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
    ) -> None:
        self.text = text
        self.model = model
        self.rewards = rewards
        self.make_plan = make_plan
        self.settings = settings
        self.seed = seed

    def losses(self, batch: PromptBatch, *, draw: int) -> Iterator[LossOutput]:
        """One loss per micro-batch.

        Args:
            batch: B prompts with their sample numbers.
            draw: number of the micro-step's first sample, the same on every rank: seeds a truncation that the
                micro-batch shares.
        """
        trajectory = self._trajectory(draw, batch.indices)
        plan = self.make_plan(len(trajectory.grad_steps))
        trained = self.text.trained(batch.prompts)
        original = self.text.original(batch.prompts) if self._needs_original else None
        text_kv = self.model.text_kv(trained)
        if self.settings.prefix_encoder == "original" and original is not None:
            with torch.no_grad():
                prefix_kv = self.model.text_kv(original)
        else:
            prefix_kv = text_kv.detach()
        latents, noises = self.model.noise([sample_seed(self.seed, index) for index in batch.indices])

        def run(latents: Tensor, start: int = 0) -> RewardOutput:
            latents = self.model.denoise(
                latents,
                text_kv=text_kv,
                prefix_kv=prefix_kv,
                trajectory=trajectory,
                plan=plan,
                noises=noises,
                start=start,
            )
            final.append(latents.detach())
            return self.rewards(self.model.decode(latents, plan), batch.prompts)

        final: list[Tensor] = []
        outputs = [run(latents)]
        last = trajectory.num_steps - 1
        for extra in range(1, self.settings.low_variance_draws):
            seeds = [sample_seed(self.seed, index, _LOW_VARIANCE_STREAM + extra) for index in batch.indices]
            outputs.append(run(self.model.sampler.add_noise(last, final[0], self.model.noise(seeds)[0]), last))

        total = torch.stack([output.total for output in outputs])  # (draws, B)
        loss = self._loss(total) * self.settings.loss_scale
        metrics = {f"reward/{name}": part.detach().mean() for name, part in outputs[0].parts.items()}
        metrics["reward/total"] = outputs[0].total.detach().mean()
        if self.settings.anchor_weight and original is not None:
            anchor = F.mse_loss(trained.cond.float(), original.cond.float())
            metrics["anchor"] = anchor.detach()
            loss = loss + self.settings.anchor_weight * anchor
        yield LossOutput(loss=loss, metrics=metrics)

    @property
    def _needs_original(self) -> bool:
        return self.settings.prefix_encoder == "original" or self.settings.anchor_weight > 0

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

    def _loss(self, total: Tensor) -> Tensor:
        """The sign flips here and nowhere else."""
        if self.settings.loss == "hinge":
            return F.relu(self.settings.hinge_margin - total).mean()
        return -total.mean()
