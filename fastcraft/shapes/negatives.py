"""Wrong captions: change what a caption claims so that a picture of the original no longer fulfils it."""

from __future__ import annotations

import random
from dataclasses import replace

from fastcraft.shapes.captions import Claims, ThingClaim
from fastcraft.shapes.scenes import BACKGROUNDS, COLORS, OPPOSITE, PATTERNS, SHAPES, SIZES, is_held_out

_VALUES = {"color": tuple(COLORS), "shape": SHAPES, "size": SIZES, "pattern": PATTERNS}


def _other(rng: random.Random, values: tuple[str, ...], value: str) -> str:
    return rng.choice([candidate for candidate in values if candidate != value])


def wrong_claims(rng: random.Random, claims: Claims, *, swap: float = 0.5) -> Claims:
    """Claims that a picture of `claims` fails, free of held-out combinations so that training may see them.

    Args:
        rng: the only source of chance.
        claims: what is true.
        swap: how often to exchange an attribute between objects rather than to change one.
    """
    while True:
        wrong = swap_attribute(rng, claims) if rng.random() < swap else change_attribute(rng, claims)[0]
        if wrong is not None and are_distinct(wrong.things) and not is_held_out(tuple(t.kind for t in wrong.things)):
            return wrong
