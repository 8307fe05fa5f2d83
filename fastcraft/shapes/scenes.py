"""What a shapes picture contains: the vocabulary, `Thing` and `Scene`, and how scenes are drawn at random."""

from __future__ import annotations

import random
from dataclasses import dataclass

IMAGE_SIZE = 64
"""Width and height of a picture in pixels."""

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.12),
    "yellow": (0.95, 0.85, 0.10),
    "green": (0.10, 0.70, 0.20),
    "cyan": (0.10, 0.80, 0.85),
    "blue": (0.15, 0.25, 0.90),
    "purple": (0.65, 0.15, 0.80),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
PATTERNS = ("plain", "striped")
BACKGROUNDS: dict[str, float] = {"black": 0.04, "gray": 0.50, "white": 0.96}
RELATIONS = ("left", "right", "above", "below")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}

RADIUS = {"small": (6.5, 7.5), "large": (11.2, 12.8)}
"""Half the side of the box around a shape, in pixels, by size: the range it is drawn from."""

VIVIDNESS = (0.5, 1.0)
"""Range of the contrast factor about mid-gray. No caption ever mentions it."""

HELD_OUT_KINDS = frozenset({("red", "triangle"), ("blue", "cross"), ("yellow", "circle")})
"""(color, shape) that no training picture and no training caption contains."""

HELD_OUT_PAIRS = frozenset(
    frozenset(pair)
    for pair in (
        (("red", "circle"), ("blue", "square")),
        (("green", "triangle"), ("purple", "cross")),
        (("cyan", "square"), ("yellow", "triangle")),
        (("red", "cross"), ("green", "circle")),
        (("blue", "circle"), ("yellow", "square")),
        (("purple", "triangle"), ("cyan", "circle")),
        (("green", "square"), ("red", "square")),
        (("cyan", "cross"), ("purple", "circle")),
    )
)
"""Two objects that no training picture and no training caption has together, although each alone is trained on."""

Kind = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Thing:
    """One object of a picture."""

    color: str
    shape: str
    size: str
    pattern: str
    x: float
    """Centre of its box, in pixels from the left edge."""
    y: float
    """Centre of its box, in pixels from the top edge."""
    radius: float
    """Half the side of its box, in pixels."""

    @property
    def kind(self) -> Kind:
        return self.color, self.shape


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture, completely described."""

    things: tuple[Thing, ...]
    background: str
    vividness: float = 1.0


def relation_between(x_offset: float, y_offset: float, *, margin: float = 1.0, min_offset: float = 6.0) -> str | None:
    """Where the first object lies as seen from the second: a word of `RELATIONS`, or None where neither axis decides.

    Args:
        x_offset, y_offset: centre of the first minus centre of the second, in pixels.
        margin: how many times the larger offset must exceed the smaller one.
        min_offset: pixels that the larger offset must reach.
    """
    across, along = abs(x_offset), abs(y_offset)
    if max(across, along) < min_offset or max(across, along) < margin * min(across, along):
        return None
    if across >= along:
        return "left" if x_offset < 0 else "right"
    return "above" if y_offset < 0 else "below"


def is_held_out(kinds: tuple[Kind, ...]) -> bool:
    """Whether objects of these kinds, together in one picture, are kept out of training."""
    if any(kind in HELD_OUT_KINDS for kind in kinds):
        return True
    return any(frozenset((a, b)) in HELD_OUT_PAIRS for i, a in enumerate(kinds) for b in kinds[:i])


def _draw_kinds(rng: random.Random, num_things: int, held_out: bool | None) -> tuple[Kind, ...]:
    colors = tuple(COLORS)
    if held_out and num_things == 1:
        return (rng.choice(sorted(HELD_OUT_KINDS)),)
    if held_out and num_things == 2 and rng.random() < 0.5:
        pair = sorted(rng.choice(sorted(sorted(pair) for pair in HELD_OUT_PAIRS)), key=lambda _: rng.random())
        return tuple(pair)
    while True:
        kinds = tuple((rng.choice(colors), rng.choice(SHAPES)) for _ in range(num_things))
        if len(set(kinds)) == num_things and (held_out is None or is_held_out(kinds) == held_out):
            return kinds


def _place(rng: random.Random, radii: list[float]) -> list[tuple[float, float]] | None:
    centers: list[tuple[float, float]] = []
    for radius in radii:
        low, high = radius + 1.5, IMAGE_SIZE - radius - 1.5
        for _ in range(20):
            x, y = rng.uniform(low, high), rng.uniform(low, high)
            gaps = (max(abs(x - a), abs(y - b)) - radius - r for (a, b), r in zip(centers, radii, strict=False))
            if all(gap >= 3.0 for gap in gaps):
                centers.append((x, y))
                break
        else:
            return None
    return centers


def sample_scene(rng: random.Random, *, num_things: int, held_out: bool | None = False) -> Scene:
    """Draw a scene of objects of different kinds that do not touch.

    Args:
        rng: the only source of chance.
        num_things: 1 to 3.
        held_out: False draws what may be trained on, True only what may not, None either.

    Raises:
        ValueError: `num_things` is not 1, 2 or 3.
    """
    if num_things not in (1, 2, 3):
        raise ValueError(f"num_things must be 1, 2 or 3, got {num_things}")
    kinds = _draw_kinds(rng, num_things, held_out)
    centers = None
    while centers is None:
        sizes = [rng.choice(SIZES) for _ in kinds]
        radii = [rng.uniform(*RADIUS[size]) for size in sizes]
        centers = _place(rng, radii)
    things = tuple(
        Thing(color, shape, size, "striped" if rng.random() < 0.4 else "plain", x, y, radius)
        for (color, shape), size, radius, (x, y) in zip(kinds, sizes, radii, centers, strict=True)
    )
    return Scene(things, rng.choice(tuple(BACKGROUNDS)), rng.uniform(*VIVIDNESS))
