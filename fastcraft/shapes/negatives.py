"""Wrong captions: change what a caption claims so that a picture of the original no longer fulfils it."""

from __future__ import annotations

import random
from dataclasses import replace

from fastcraft.shapes.captions import Claims, ThingClaim
from fastcraft.shapes.scenes import BACKGROUNDS, COLORS, OPPOSITE, PATTERNS, SHAPES, SIZES, is_held_out

_VALUES = {"color": tuple(COLORS), "shape": SHAPES, "size": SIZES, "pattern": PATTERNS}


def _other(rng: random.Random, values: tuple[str, ...], value: str) -> str:
    return rng.choice([candidate for candidate in values if candidate != value])


def change_attribute(rng: random.Random, claims: Claims) -> tuple[Claims, str]:
    """Change one claimed word to another of its kind. Returns the new claims and the kind of what changed."""
    options: list[tuple[str, int]] = [("background", 0)] if claims.background else []
    options += [("relation", index) for index in range(len(claims.relations))]
    for index, thing in enumerate(claims.things):
        options += [(kind, index) for kind in _VALUES if getattr(thing, kind) is not None]
    kind, index = rng.choice(options)
    if kind == "background":
        return replace(claims, background=_other(rng, tuple(BACKGROUNDS), claims.background or "")), kind
    if kind == "relation":
        return turn_relation(claims, index), kind
    things = list(claims.things)
    things[index] = replace(things[index], **{kind: _other(rng, _VALUES[kind], getattr(things[index], kind))})
    return replace(claims, things=tuple(things)), kind


def turn_relation(claims: Claims, index: int) -> Claims:
    """The opposite of one claimed relation."""
    relations = list(claims.relations)
    relations[index] = replace(relations[index], relation=OPPOSITE[relations[index].relation])
    return replace(claims, relations=tuple(relations))


def swap_attribute(rng: random.Random, claims: Claims) -> Claims | None:
    """Exchange one attribute between the first two objects: the same words, bound wrongly. None where none differs."""
    if len(claims.things) < 2:
        return None
    first, second, *rest = claims.things
    kinds = [kind for kind in _VALUES if getattr(first, kind) != getattr(second, kind)]
    # exchanging the only attribute that tells two objects apart just lists them in another order
    if len(kinds) < 2 and not claims.relations:
        return None
    kind = rng.choice(kinds)
    swapped = (replace(first, **{kind: getattr(second, kind)}), replace(second, **{kind: getattr(first, kind)}))
    return replace(claims, things=(*swapped, *rest))


def are_distinct(things: tuple[ThingClaim, ...]) -> bool:
    """Whether no two objects have color and shape in common."""
    return len({thing.kind for thing in things}) == len(things)


def wrong_claims(rng: random.Random, claims: Claims, *, swap: float = 0.5, turn: float = 0.0) -> Claims:
    """Claims that a picture of `claims` fails, free of held-out combinations so that training may see them.

    Args:
        rng: the only source of chance.
        claims: what is true.
        swap: how often to exchange an attribute between objects rather than to change one.
        turn: how often to turn a relation round instead, where the caption claims one.
    """
    if claims.relations and rng.random() < turn:
        return turn_relation(claims, rng.randrange(len(claims.relations)))
    while True:
        wrong = swap_attribute(rng, claims) if rng.random() < swap else change_attribute(rng, claims)[0]
        if wrong is not None and are_distinct(wrong.things) and not is_held_out(tuple(t.kind for t in wrong.things)):
            return wrong
