"""CLIP similarity of image and prompt."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

from torch import Tensor

from fastcraft.rewards.base import Reward
from fastcraft.rewards.checks import checked_number, checked_resize
from fastcraft.rewards.clip_tower import OPENAI_CLIP_L, ClipTower, Towers
from fastcraft.rewards.preprocess import Resize


class ClipReward(Reward):
    """``scale * cos(image, prefix + prompt)`` of frozen CLIP features, per image (never the B x B matrix).

    Numbers in print differ in backbone, prefix and scale; `settings` records all three. TextCraftor's external CLIP
    constraint is this with scale 100 and OpenCLIP ViT-g-14.

    Args:
        tower: the CLIP model.
        scale: factor on the cosine; 1 = the plain cosine.
        prefix: put before every prompt, for example ``"A photo depicts "``.
        resize: see `resize_normalize`.

    Source: Radford et al. 2021, arXiv:2103.00020, section 2; TextCraftor, arXiv:2403.18978, section 3.
    """

    name = "clip"
    uses_prompt = True
    loads_weights = True
    score_range = "[-scale, scale]; ViT-L/14 gives about 0.15 to 0.35 at scale 1"

    def __init__(self, tower: ClipTower, *, scale: float = 1.0, prefix: str = "", resize: Resize = "bicubic") -> None:
        super().__init__()
        self.tower = tower
        self.scale = checked_number("clip", "scale", scale)
        self.prefix = prefix
        self.resize: Resize = checked_resize("clip", resize)
        self.freeze()

    @classmethod
    def build(cls, path: str, *, towers: Towers, **options: Any) -> Self:
        """``path`` is the CLIP model; empty = openai/clip-vit-large-patch14."""
        return cls(towers.clip(path or OPENAI_CLIP_L), **options)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Backbone, prefix, scale and resize."""
        return {
            "backbone": self.tower.source,
            "prefix": self.prefix,
            "scale": self.scale,
            "resize": self.resize,
        }

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """``(B, 3, H, W)`` in ``[0, 1]`` and B prompts to ``(B,)`` float32 in ``[-scale, scale]``."""
        text = self.tower.text_features([self.prefix + prompt for prompt in prompts])  # (B, D)
        return self.scale * (self.tower.image_features(images, resize=self.resize) * text).sum(dim=-1)
