"""The weighted sum of rewards, with per-reward normalisation by choice.

Shape letters: B images, R rewards.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastcraft.errors import UserError
from fastcraft.records import RewardOutput
from fastcraft.rewards.balance import balance
from fastcraft.rewards.base import Reward
from fastcraft.rewards.checks import check_name, checked_number
from fastcraft.rewards.statistics import RunningStatistics
from fastcraft.rewards.tower import Tower

Normalize = Literal["none", "running_std", "gradient_share"]


class WeightedRewards(nn.Module):
    """``sum_i weight_i * reward_i(images, prompts) / std_i``.

    Rewards that share a `Tower` share its image features, and those whose towers have one size share the preprocessed
    images. A reward with weight 0 is scored without gradient, to be watched only.

    Args:
        rewards: ``(name, reward, weight)``; a negative weight drives a score down.
        normalize: ``"none"``: ``std_i`` is 1, as in TextCraftor; ``"running_std"``: the standard deviation of all
            scores of the run so far, of all ranks up to the last `synchronize` and of this rank since, this batch
            included, at least ``std_floor`` (1 while there is only one score). No gradient flows through it.
            ``"gradient_share"``: ``std_i`` is such that each reward's gradient at the images has the stated share of
            their norms' sum, ``|weight_i| / sum_j |weight_j|``, in every micro-batch; see `balance`. Where there is no
            gradient, in evaluation, it is 1.
        require_grad: the mix will be back-propagated: refuse what cannot be.
        std_floor: smallest divisor, in units of the reward.

    Raises:
        UserError: no rewards, a name twice or reserved, a weight that is no finite number, all weights 0 or a non-zero
            weight on a reward without gradient while ``require_grad``.

    Source: TextCraftor, arXiv:2403.18978, equation 7; the normalisations are ours.
    """

    def __init__(
        self,
        rewards: Sequence[tuple[str, Reward, float]],
        *,
        normalize: Normalize = "none",
        require_grad: bool = True,
        std_floor: float = 1e-3,
    ) -> None:
        super().__init__()
        self.names = [name for name, _, _ in rewards]
        self.weights = [checked_number(name, "weight", weight) for name, _, weight in rewards]
        self.rewards = nn.ModuleList(reward.freeze() for _, reward, _ in rewards)
        self.normalize = normalize
        self.statistics = RunningStatistics(self.names, floor=std_floor) if normalize == "running_std" else None
        self._check(require_grad)
        self._towers = [module for module in self.modules() if isinstance(module, Tower)]

    def _check(self, require_grad: bool) -> None:
        if not self.names:
            raise UserError("rewards: at least one is needed, got none")
        for name in self.names:
            check_name(name)
            if self.names.count(name) > 1:
                raise UserError(f"rewards: {name!r} is named twice")
        if self.normalize not in get_args(Normalize):
            known = ", ".join(map(repr, get_args(Normalize)))
            raise UserError(f"rewards: normalize must be one of {known}, got {self.normalize!r}")
        if not require_grad:
            return
        for name, reward, weight in zip(self.names, self.rewards, self.weights, strict=True):
            if weight != 0 and not reward.differentiable:
                raise UserError(f"rewards: {name!r} has no gradient, so its weight must be 0 here, got {weight}")
        if not any(self.weights):
            raise UserError("rewards: at least one weight must not be 0")

    def forward(self, images: Tensor, prompts: Sequence[str], *, update_statistics: bool | None = None) -> RewardOutput:
        """Score a micro-batch.

        Args:
            images: ``(B, 3, H, W)`` float32 or bfloat16, in ``[0, 1]``.
            prompts: ``B`` strings.
            update_statistics: take these scores into the running standard deviations; None = when ``images`` carries
                gradient, so evaluation changes nothing.

        Returns:
            ``total`` ``(B,)`` float32 with gradient, ``parts`` the raw scores by name, detached.

        Raises:
            ValueError: ``prompts`` and ``images`` differ in number, or a reward broke its contract.
        """
        if len(prompts) != images.shape[0]:
            raise ValueError(f"WeightedRewards: {images.shape[0]} images but {len(prompts)} prompts")
        with_grad = images.requires_grad and torch.is_grad_enabled()
        balanced = self.normalize == "gradient_share" and with_grad
        source = images.detach().requires_grad_() if balanced else images
        scores = self._scores(source, prompts)
        raw = torch.stack([score.detach() for score in scores])  # (R, B)
        if self.statistics is not None and (with_grad if update_statistics is None else update_statistics):
            self.statistics.update(raw)
        if balanced:
            trained = [i for i in range(len(scores)) if self._wants_grad(i)]
            weights = [self.weights[i] for i in trained]
            total = balance(images, source, [scores[i] for i in trained], weights)
        else:
            total = self._weighted(scores, images.device)
        return RewardOutput(total=total, parts=dict(zip(self.names, raw, strict=True)))

    def _weighted(self, scores: Sequence[Tensor], device: torch.device) -> Tensor:
        """``(B,)``: the sum over rewards, each divided by its running standard deviation if so wished."""
        total = torch.zeros(scores[0].shape[0], dtype=torch.float32, device=device)
        divisors = None if self.statistics is None else self.statistics.std(device).float()  # (R,)
        for i, (score, weight) in enumerate(zip(scores, self.weights, strict=True)):
            if weight != 0:
                total = total + weight * (score if divisors is None else score / divisors[i])
        return total

    def synchronize(self) -> None:
        """Share the running statistics with the other ranks; collective, once per step on every rank."""
        if self.statistics is not None:
            self.statistics.synchronize()

    def _scores(self, images: Tensor, prompts: Sequence[str]) -> list[Tensor]:
        """R x ``(B,)``, those that carry gradient first in time, so that the others reuse their features."""
        scores: dict[int, Tensor] = {}
        # A stable sort: weight 0 (False) comes after any other.
        order = sorted(range(len(self.names)), key=lambda i: not self._wants_grad(i))
        with ExitStack() as stack:
            for tower in self._towers:
                stack.enter_context(tower.shared_images())
            for i in order:
                with torch.set_grad_enabled(torch.is_grad_enabled() and self._wants_grad(i)):
                    scores[i] = self.rewards[i](images, prompts)
                if scores[i].shape != (images.shape[0],) or scores[i].dtype != torch.float32:
                    raise ValueError(
                        f"reward {self.names[i]!r} must return float32 of shape ({images.shape[0]},), "
                        f"got {scores[i].dtype} of shape {tuple(scores[i].shape)}"
                    )
        return [scores[i] for i in range(len(self.names))]

    def _wants_grad(self, i: int) -> bool:
        reward = self.rewards[i]
        assert isinstance(reward, Reward)
        return self.weights[i] != 0 and reward.differentiable

    @property
    def image_networks(self) -> list[nn.Module]:
        """The parts of the towers that read pictures, each once; see `Tower.image_network`."""
        return [network for tower in self._towers if (network := tower.image_network) is not None]

    @property
    def settings(self) -> dict[str, Mapping[str, Any]]:
        """Weight and settings of every reward, plain values for the run's record."""
        return {
            name: {"weight": weight, **reward.settings}  # type: ignore[dict-item]
            for name, reward, weight in zip(self.names, self.rewards, self.weights, strict=True)
        }

    @property
    def counts(self) -> dict[str, Mapping[str, int]]:
        """By name, what the rewards that count anything have counted since they were made."""
        return {
            name: reward.counts  # type: ignore[misc]
            for name, reward in zip(self.names, self.rewards, strict=True)
            if reward.counts
        }

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The running statistics alone (nothing without normalisation): the rewards' weights never change."""
        return {} if self.statistics is None else self.statistics.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Continue from `state_dict` of a mix of the same rewards.

        Raises:
            UserError: the state belongs to other rewards or to the other normalisation.
        """
        present = self.state_dict()
        if set(present) != set(state_dict):
            raise UserError(
                f"rewards: the saved statistics are of {sorted(state_dict)}, this mix has {sorted(present)}: "
                "names and normalize must be those of the saved run"
            )
        if self.statistics is not None:
            self.statistics.load_state_dict(state_dict)
