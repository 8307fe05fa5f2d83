"""Denscore: a CLIP similarity for long captions, read sentence by sentence.

Shape letters: B images, S segments of a caption, D width of the joint embedding.
"""

import re
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from fastcraft.rewards.clip_files import LAION_CLIP_H, released_clip
from fastcraft.rewards.clip_tower import ClipTower, Towers
from fastcraft.rewards.tower_reward import TowerReward

REPO = "luping-liu/Denscore"
_END = re.compile(
    r"""(?<!\b[A-Z]\.)(?<!\b(?:Mr|Ms|Dr|St|vs|No)\.)(?<!\b(?:Mrs|e\.g|i\.e)\.)(?<!\bProf\.)  # no end of a sentence
        (?:(?<=[.!?;\u2026])|(?<=[.!?]["'\u201d\u2019)]))\s+
        |(?<=[\u3002\uff01\uff1f\uff1b])\s*|\s*\n\s*""",
    re.VERBOSE,
)


class DenscoreReward(TowerReward):
    """Mean over a caption's segments of ``cos(image, segment)``; a segment is a sentence that the text half can hold.

    The mean is of unit vectors and is not normalised again. Reported numbers are usually times 100. LongAlign's own
    code splits at any full stop, decimals too; here sentences are split and a longer one is cut between words.

    Official preprocessing: LongAlign's training code cuts 504 x 504 pixels out at random, against blocky pictures, and
    squeezes them to 224 by bilinear, which is an augmentation and no score. Here it is that of the processor whose
    tokenizer it names, transformers' ``CLIPProcessor``, as for PickScore: short side to 224 by bicubic, the centre cut
    out, half a pixel rounded down (`placement` ``crop_floor``); the text, which is not cleaned (no ftfy, no
    unescaping), with accents composed, white space collapsed and letters lowered, 77 tokens for each segment.

    Args:
        tower: the CLIP model.
        options: see `TowerReward`.

    Source: LongAlign, arXiv:2410.11817, section 3 and its released score.
    """

    name = "denscore"
    uses_prompt = True
    score_range = "[-1, 1]; 0.2 to 0.24 in the paper's table"
    fit = "crop_floor"
    files = released_clip(REPO, vocabulary=LAION_CLIP_H)

    def __init__(self, tower: ClipTower, **options: Any) -> None:
        super().__init__(tower, **options)
        self.freeze()

    @classmethod
    def build(cls, path: str, *, towers: Towers, tokenizer_path: str = "", **options: Any) -> Self:
        """``path`` is a folder or hub id with a CLIPModel; empty = luping-liu/Denscore.

        ``tokenizer_path`` holds CLIP's vocabulary; empty = the folder's own, or else laion/CLIP-ViT-H-14-laion2B-...
        """
        return cls(towers.clip(path or REPO, tokenizer_path=tokenizer_path, tokenizer=LAION_CLIP_H), **options)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """``(B, 3, H, W)`` in ``[0, 1]`` and B captions to ``(B,)`` float32 in ``[-1, 1]``."""
        return torch.stack([scores.mean() for scores in self.segment_scores(images, prompts)])

    def segment_scores(self, images: Tensor, prompts: Sequence[str]) -> list[Tensor]:
        """B x ``(S,)`` float32: how well each segment of its caption describes the image."""
        features = self.image_features(images)  # (B, D)
        return [
            self.tower.text_features(self.segments(prompt)) @ row for row, prompt in zip(features, prompts, strict=True)
        ]

    def segments(self, caption: str) -> list[str]:
        """At least one text; none is longer than the text half can hold, unless it is a single word."""
        return [part for sentence in split_sentences(caption) for part in self._fitting(sentence)]

    def _fitting(self, sentence: str) -> list[str]:
        words = sentence.split()
        if len(words) < 2 or self.tower.num_tokens(sentence) <= self.tower.max_tokens:
            return [sentence]
        middle = len(words) // 2
        return self._fitting(" ".join(words[:middle])) + self._fitting(" ".join(words[middle:]))


def split_sentences(caption: str) -> list[str]:
    """Sentences with their end marks, which keeps decimals, initials and common abbreviations whole.

    An empty caption is one empty sentence.
    """
    return [part for part in _END.split(caption.strip()) if part] or [""]
