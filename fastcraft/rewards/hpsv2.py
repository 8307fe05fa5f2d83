"""Human Preference Score v2 and v2.1: the cosine of a ViT-H/14 CLIP model trained on people's choices."""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

from torch import Tensor

from fastcraft.rewards.clean_text import clean_open_clip_text
from fastcraft.rewards.clip_files import OPENAI_CLIP_L, released_vocabulary
from fastcraft.rewards.clip_tower import ClipTower, Towers
from fastcraft.rewards.tensor_files import ReleasedFile, find_file
from fastcraft.rewards.tower_reward import TowerReward

REPO = "xswu/HPSv2"
HEAD_WIDTH = 80
"""Of ViT-H/14's image half: 1280 features in 16 heads."""


class HPSv2Reward(TowerReward):
    """``cos(image, prompt)``, per image and without the model's logit scale; times 100 in the benchmark's tables.

    The released file has open_clip's names; it is mapped to transformers' ``CLIPModel`` when read.

    Official preprocessing, of the authors' open_clip: the long side of the picture, as a float tensor, becomes 224 by
    bicubic without a clamp, and the rest is black (`placement` ``pad``); the text goes through `clean_open_clip_text`
    and is cut at 77 tokens. The resize is antialiased, as torchvision does it from 0.17 on. A picture whose long side
    is 224 already is officially not padded, and then fits no model; here it is padded too.

    Args:
        tower: the CLIP model.
        options: see `TowerReward`.

    Source: Wu et al. 2023, arXiv:2306.09341.
    """

    name = "hpsv2"
    uses_prompt = True
    score_range = "[-1, 1]; Stable Diffusion 1.4 gives about 0.27"
    fit = "pad"
    files: ClassVar[tuple[ReleasedFile, ...]] = (
        ReleasedFile(name="HPS_v2_compressed.pt", repo=REPO),
        released_vocabulary(OPENAI_CLIP_L),
    )

    def __init__(self, tower: ClipTower, **options: Any) -> None:
        super().__init__(tower, **options)
        self.freeze()

    @classmethod
    def build(cls, path: str, *, towers: Towers, tokenizer_path: str = "", **options: Any) -> Self:
        """``path`` is the released file, a folder with it or a hub id; empty = the hub's.

        ``tokenizer_path`` holds CLIP's vocabulary; empty = beside the file, or else openai/clip-vit-large-patch14.
        """
        file = find_file(path, cls.files[0], reward=cls.name)
        tower = towers.clip(str(file), tokenizer_path=tokenizer_path, head_width=HEAD_WIDTH)
        return cls(tower, **options)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """``(B, 3, H, W)`` in ``[0, 1]`` and B prompts to ``(B,)`` float32 in ``[-1, 1]``."""
        text = self.tower.text_features([clean_open_clip_text(prompt) for prompt in prompts])  # (B, D)
        return (self.image_features(images) * text).sum(dim=-1)


class HPSv21Reward(HPSv2Reward):
    """The same with the v2.1 weights; scores of the two versions are not comparable.

    Official preprocessing: that of v2.
    """

    name = "hpsv2.1"
    score_range = "[-1, 1]; Stable Diffusion 1.4 gives about 0.25"
    files = (ReleasedFile(name="HPS_v2.1_compressed.pt", repo=REPO), released_vocabulary(OPENAI_CLIP_L))
