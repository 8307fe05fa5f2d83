"""The training set: scenes, captions and pictures drawn once from a seed, nothing held out among them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcraft.shapes.captions import Claims, sample_claims, write_long, write_short
from fastcraft.shapes.prompt_sets import held_out_captions
from fastcraft.shapes.render import render
from fastcraft.shapes.scenes import Scene, sample_scene

MAX_WORDS = 70
"""Captions of training fit into the 77 tokens of the text encoder."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """N pictures and one caption for each."""

    pictures: Tensor
    """(N, 3, 64, 64) uint8."""
    captions: list[str]
    claims: list[Claims]

    def batch(self, rows: Tensor) -> Tensor:
        """Pictures of these rows as (B, 3, 64, 64) float32 in [0, 1]."""
        return self.pictures[rows].float() / 255.0


def _draw(rng: random.Random) -> tuple[Scene, Claims, str]:
    """One third one object, over half two; one caption in six has several sentences, and only those name three."""
    several = rng.random() < 1.0 / 6.0
    num_things = rng.choices((1, 2, 3), (1, 3, 2) if several else (2, 3, 0))[0]
    scene = sample_scene(rng, num_things=num_things)
    claims = sample_claims(rng, scene)
    caption = (
        write_long(rng, claims, max_sentences=rng.randint(num_things + 1, 7)) if several else write_short(rng, claims)
    )
    return scene, claims, caption


def draw_corpus(num_pictures: int, *, seed: int) -> Corpus:
    """Draw a training set. The captions of the held-out files and the held-out combinations never enter it."""
    rng = random.Random(seed)
    forbidden = held_out_captions()
    drawn: list[tuple[Scene, Claims, str]] = []
    while len(drawn) < num_pictures:
        example = _draw(rng)
        if example[2] not in forbidden and len(example[2].split()) + example[2].count(".") <= MAX_WORDS:
            drawn.append(example)
    pictures = torch.cat(
        [
            (render([scene for scene, _, _ in drawn[start : start + 500]]) * 255.0).round().to(torch.uint8)
            for start in range(0, num_pictures, 500)
        ]
    )
    return Corpus(pictures, [caption for _, _, caption in drawn], [claims for _, claims, _ in drawn])
