"""PickScore: the scaled cosine of a CLIP-H model trained on people's choices."""

from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor

from fastcraft.rewards.clip_files import LAION_CLIP_H, released_clip
from fastcraft.rewards.clip_tower import ClipTower, Towers
from fastcraft.rewards.tower_reward import TowerReward

REPO = "yuvalkirstain/PickScore_v1"


class PickScoreReward(TowerReward):
    """``exp(logit_scale) * cos(image, prompt)`` of matched pairs only, never the mean of the B x B matrix.

    The released TextCraftor averages over the whole matrix, so its numbers (about 18.8 for Stable Diffusion 1.5) cannot
    be compared with these (about 21).

    Official preprocessing, of transformers' ``CLIPProcessor``: the short side of the 8-bit picture becomes 224 by
    bicubic, then the centre is cut out, half a pixel rounded down (`placement` ``crop_floor``); the text is not cleaned
    (no ftfy, no unescaping): accents are composed, white space is collapsed, letters are lowered, and it is cut at 77
    tokens.

    Args:
        tower: the CLIP model.
        options: see `TowerReward`.

    Source: Kirstain et al. 2023, arXiv:2305.01569, section 3.
    """

    name = "pickscore"
    uses_prompt = True
    score_range = "[-100, 100]; Stable Diffusion 1.5 gives about 21"
    fit = "crop_floor"
    files = released_clip(REPO, vocabulary=LAION_CLIP_H)

    def __init__(self, tower: ClipTower, **options: Any) -> None:
        super().__init__(tower, **options)
        self.freeze()

    @classmethod
    def build(cls, path: str, *, towers: Towers, tokenizer_path: str = "", **options: Any) -> Self:
        """``path`` is a folder or hub id with a CLIPModel; empty = yuvalkirstain/PickScore_v1.

        ``tokenizer_path`` holds CLIP's vocabulary; empty = the folder's own, or else laion/CLIP-ViT-H-14-laion2B-...
        """
        return cls(towers.clip(path or REPO, tokenizer_path=tokenizer_path, tokenizer=LAION_CLIP_H), **options)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """``(B, 3, H, W)`` in ``[0, 1]`` and B prompts to ``(B,)`` float32."""
        cosine = (self.image_features(images) * self.tower.text_features(prompts)).sum(dim=-1)
        return self.tower.logit_scale * cosine
