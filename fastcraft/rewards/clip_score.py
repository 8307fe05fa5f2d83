"""CLIP similarity of image and prompt."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

from torch import Tensor

from fastcraft.rewards.checks import checked_number
from fastcraft.rewards.clean_text import clean_text
from fastcraft.rewards.clip_files import OPENAI_CLIP_L, released_clip
from fastcraft.rewards.clip_tower import ClipTower, Towers
from fastcraft.rewards.tower_reward import TowerReward


class ClipReward(TowerReward):
    """``scale * cos(image, prefix + prompt)`` of frozen CLIP features, per image (never the B x B matrix).

    Numbers in print differ in backbone, prefix and scale; `settings` records all three. TextCraftor's external CLIP
    constraint is this with scale 100 and OpenCLIP ViT-g-14.

    Official preprocessing, of OpenAI's CLIP and of open_clip: the short side of the 8-bit picture becomes the model's
    size by bicubic, then the centre is cut out (`placement` ``crop``); the text goes through `clean_text` and is cut
    at the model's length, 77 tokens. Scores made with transformers' ``CLIPProcessor``, as torchmetrics makes them, do
    not clean the text, and round half a pixel of the crop down.

    Args:
        tower: the CLIP model.
        scale: factor on the cosine; 1 = the plain cosine.
        prefix: put before every prompt, for example ``"A photo depicts "``.
        options: see `TowerReward`.

    Source: Radford et al. 2021, arXiv:2103.00020, section 2; TextCraftor, arXiv:2403.18978, section 3.
    """

    name = "clip"
    uses_prompt = True
    score_range = "[-scale, scale]; ViT-L/14 gives about 0.15 to 0.35 at scale 1"
    files = released_clip(OPENAI_CLIP_L)

    def __init__(self, tower: ClipTower, *, scale: float = 1.0, prefix: str = "", **options: Any) -> None:
        super().__init__(tower, **options)
        self.scale = checked_number("clip", "scale", scale)
        self.prefix = prefix
        self.freeze()

    @classmethod
    def build(
        cls,
        path: str,
        *,
        towers: Towers,
        tokenizer_path: str = "",
        activation: str = "gelu",
        head_width: int = 0,
        **options: Any,
    ) -> Self:
        """``path`` is the CLIP model: a folder or hub id of transformers, or a file or folder of open_clip.

        Empty = openai/clip-vit-large-patch14. ``activation`` and ``head_width`` are what an open_clip file does not
        say, see `load_open_clip`; a transformers folder says them itself.
        """
        tower = towers.clip(
            path or OPENAI_CLIP_L, tokenizer_path=tokenizer_path, activation=activation, head_width=head_width
        )
        return cls(tower, **options)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Backbone, resize, clamp, prefix and scale."""
        return {**super().settings, "prefix": self.prefix, "scale": self.scale}

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """``(B, 3, H, W)`` in ``[0, 1]`` and B prompts to ``(B,)`` float32 in ``[-scale, scale]``."""
        text = self.tower.text_features([clean_text(self.prefix + prompt) for prompt in prompts])  # (B, D)
        return self.scale * (self.image_features(images) * text).sum(dim=-1)
