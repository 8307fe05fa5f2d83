"""What the rewards that read a CLIP model's image features have in common."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from fastcraft.rewards.base import Reward
from fastcraft.rewards.checks import checked_flag, checked_resize
from fastcraft.rewards.clip_tower import ClipTower
from fastcraft.rewards.preprocess import Fit, Resize


class TowerReward(Reward):
    """A reward on a frozen `ClipTower`, which others may share.

    Args:
        tower: the CLIP model.
        resize: see `resize_normalize`.
        clamp: straight-through clamp to [0, 1] after the resize; see `resize_normalize`.
    """

    loads_weights = True
    fit: ClassVar[Fit] = "crop"
    """How the official code brings a picture into the square; see `placement`."""

    def __init__(self, tower: ClipTower, *, resize: Resize = "bicubic", clamp: bool = False) -> None:
        super().__init__()
        self.tower = tower
        self.resize: Resize = checked_resize(self.name, resize)
        self.clamp = checked_flag(self.name, "clamp", clamp)

    def image_features(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` in ``[0, 1]`` to ``(B, D)`` float32, unit rows, with gradient."""
        return self.tower.image_features(images, resize=self.resize, clamp=self.clamp, fit=self.fit)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Backbone, resize and clamp."""
        return {"backbone": self.tower.source, "resize": self.resize, "clamp": self.clamp}
