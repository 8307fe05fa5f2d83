"""Rewards: frozen judges of images, and their weighted mix."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fastcraft.errors import UserError
from fastcraft.registry import Registry

if TYPE_CHECKING:
    from fastcraft.rewards.clip_tower import Towers
    from fastcraft.rewards.mix import WeightedRewards

REWARDS = Registry(
    "reward",
    {
        "aesthetic": "fastcraft.rewards.aesthetic:AestheticReward",
        "brightness": "fastcraft.rewards.brightness:BrightnessReward",
        "callable": "fastcraft.rewards.user_function:CallableReward",
        "clip": "fastcraft.rewards.clip_score:ClipReward",
        "denscore": "fastcraft.rewards.denscore:DenscoreReward",
        "face": "fastcraft.rewards.detection:FaceReward",
        "hand": "fastcraft.rewards.detection:HandReward",
        "hpsv2": "fastcraft.rewards.hpsv2:HPSv2Reward",
        "hpsv2.1": "fastcraft.rewards.hpsv2:HPSv21Reward",
        "imagereward": "fastcraft.rewards.imagereward:ImageRewardReward",
        "jpeg_size": "fastcraft.rewards.jpeg_size:JpegSizeReward",
        "pickscore": "fastcraft.rewards.pickscore:PickScoreReward",
    },
)


class RewardSpec(NamedTuple):
    """One entry of a mix."""

    name: str
    """A name of `REWARDS` or ``"package.module:Class"``."""
    weight: float = 1.0
    """Its factor in the total."""
    path: str = ""
    """Weights; empty = the reward's default, ``"shapes"`` = the bundled ones."""
    options: Mapping[str, Any] = {}
    """The reward's own options."""
    label: str = ""
    """What it is called in metrics; empty = its name. Not ``total``, ``file`` or ``prompt``."""


def build_rewards(
    specs: Sequence[RewardSpec],
    *,
    towers: "Towers",
    normalize: Literal["none", "running_std", "gradient_share"] = "none",
    require_grad: bool = True,
) -> "WeightedRewards":
    """Load every reward of a recipe, sharing CLIP models between those that name the same one.

    Args:
        specs: what to build.
        towers: CLIP models that are loaded already, the device and dtype of all others, and the bundled folder. Two
            mixes built with the same `Towers` share their models.
        normalize: see `WeightedRewards`.
        require_grad: see `WeightedRewards`.

    Raises:
        UserError: an unknown name or option, a class that is no `Reward`, a reserved label, weights that do not load,
            a bad weight.
    """
    from fastcraft.rewards.base import Reward
    from fastcraft.rewards.checks import check_name, check_options
    from fastcraft.rewards.mix import WeightedRewards

    mix = []
    for name, weight, path, options, label in specs:
        reward_class = REWARDS.get(name)
        if not (isinstance(reward_class, type) and issubclass(reward_class, Reward)):
            raise UserError(
                f"rewards: {name!r} must be a subclass of fastcraft.rewards.base.Reward; "
                "a function is option function of the reward 'callable'"
            )
        check_options(reward_class, options, reward=name)
        shown = label or (reward_class.name if ":" in name else name)
        check_name(shown)  # before its weights are read, and those of the rewards after it
        reward = reward_class.build(path, towers=towers, **options).to(towers.device)
        mix.append((shown, reward, weight))
    return WeightedRewards(mix, normalize=normalize, require_grad=require_grad)
