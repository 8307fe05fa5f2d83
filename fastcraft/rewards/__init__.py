"""Rewards: frozen judges of images, and their weighted mix."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastcraft.errors import UserError
from fastcraft.registry import Registry

if TYPE_CHECKING:
    import torch

    from fastcraft.rewards.mix import WeightedRewards

REWARDS = Registry(
    "reward",
    {
        "aesthetic": "fastcraft.rewards.aesthetic:AestheticReward",
        "brightness": "fastcraft.rewards.brightness:BrightnessReward",
        "clip": "fastcraft.rewards.clip_score:ClipReward",
    },
)


def build_rewards(
    specs: Sequence[tuple[str, float, str, Mapping[str, Any]]],
    *,
    device: "torch.device | str",
    dtype: "torch.dtype",
    bundled: Path | None,
    normalize: Literal["none", "running_std"] = "none",
    require_grad: bool = True,
) -> "WeightedRewards":
    """Load every reward of a recipe, sharing CLIP models between those that name the same one.

    Args:
        specs: ``(name, weight, path, options)``: a name of `REWARDS` or ``"package.module:Class"``; the factor in the
            total; weights (empty = the reward's default, ``"shapes"`` = the bundled ones); the reward's own options.
        device: where the rewards run.
        dtype: of the towers' weights and arithmetic; preprocessing, heads and scores are float32.
        bundled: folder with a CLIPModel and ``aesthetic.safetensors``, for ``"shapes"``; None = there is none.
        normalize: see `WeightedRewards`.
        require_grad: see `WeightedRewards`.

    Raises:
        UserError: an unknown name or option, a class that is no `Reward`, weights that do not load, a bad weight.
    """
    from fastcraft.rewards.base import Reward
    from fastcraft.rewards.checks import check_options
    from fastcraft.rewards.clip_tower import Towers
    from fastcraft.rewards.mix import WeightedRewards

    towers = Towers(device=device, dtype=dtype, bundled=bundled)
    mix = []
    for name, weight, path, options in specs:
        reward_class = REWARDS.get(name)
        if not (isinstance(reward_class, type) and issubclass(reward_class, Reward)):
            raise UserError(f"rewards: {name!r} must be a subclass of fastcraft.rewards.base.Reward")
        check_options(reward_class, options, reward=name)
        reward = reward_class.build(path, towers=towers, **options).to(device)
        mix.append((reward_class.name if ":" in name else name, reward, weight))
    return WeightedRewards(mix, normalize=normalize, require_grad=require_grad)
