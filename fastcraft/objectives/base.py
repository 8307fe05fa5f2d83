"""What the trainer and `fastcraft.build` ask of an objective; registering one takes a file and a line in `OBJECTIVES`.

An objective works in rounds. A round of reward back-propagation is one update of the weights; a round of a policy
gradient is a rollout and the updates made from it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from fastcraft.records import Loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What has to be there for an objective with certain settings.

    ``reward_gradients``: rewards are differentiated, so all that are trained on must have a gradient.
    ``backprop_steps``: K, denoising steps with gradient; ``input_grad`` and ``uncond_grad`` as in `Trajectory`.
    ``fixed_prefix``: the steps without gradient always end at the same step, so their latents can be kept.
    ``original_embeds``: the original encoder's embeddings are compared with the trained one's.
    ``normalize_rewards``: see `fastcraft.rewards.mix.WeightedRewards`.
    """

    reward_gradients: bool
    backprop_steps: int
    input_grad: bool = True
    uncond_grad: bool = True
    fixed_prefix: bool = False
    original_embeds: bool = False
    straight_through_clamp: bool = False
    normalize_rewards: str = "none"


class Settings(Protocol):
    """An objective's section of a recipe, besides its name: a frozen, keyword-only dataclass.

    Its ``__post_init__`` raises `UserError` for values that cannot be.
    """

    @property
    def needs(self) -> Needs:
        """What these settings ask of the rest of a run."""

    def check(self, *, num_inference_steps: int, prefix_by: str) -> None:
        """Raise `UserError` where the settings do not fit the sampler's T or who conditions the prefix."""


class Objective(Protocol):
    """Prompts in, losses out."""

    Settings: ClassVar[type]
    updates_per_round: int

    def round(self, number: int, *, done: int = 0) -> Iterator[Loss]:
        """The losses of one round, those that close an update saying so.

        Each loss is back-propagated before the next one is asked for. When memory ran out in one, the round is asked
        for again from there.

        Args:
            number: of the round, from 0; the same on every rank.
            done: losses of this round that have been back-propagated already.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """What the next round depends on besides the weights, kept in checkpoints; the same on every rank."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state_dict`."""
