"""Draw scenes: 64x64 RGB pictures in [0, 1], antialiased from signed distances, thousands a second."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcraft.shapes.scenes import BACKGROUNDS, COLORS, IMAGE_SIZE, Scene

STRIPE_PERIOD = 8.0
"""Pixels from one bright band to the next: bands are 4 pixels wide."""

DARK_BAND = 0.5
"""Brightness of the dark bands of a striped object, as a fraction of its color."""

CROSS_ARM = 0.36
"""Half the width of a cross's arm, as a fraction of its radius."""


def signed_distance(shape: str, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Approximate distance to a shape's edge in pixels, negative inside: (B, H, W).

    Args:
        shape: one of `SHAPES`.
        dx, dy: (B, 1, W) and (B, H, 1) pixel centre minus object centre.
        radius: (B, 1, 1) half the side of the box around the object.
    """
    across, along = dx.abs(), dy.abs()
    if shape == "circle":
        return torch.sqrt(dx * dx + dy * dy) - radius
    if shape == "square":
        return torch.maximum(across, along) - radius
    if shape == "triangle":
        # apex at the top of the box, base along its bottom: sides of slope 2
        return torch.maximum((2.0 * across - dy - radius) / 5.0**0.5, dy - radius)
    arm = CROSS_ARM * radius
    return torch.minimum(torch.maximum(across - radius, along - arm), torch.maximum(across - arm, along - radius))


def coverage(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Share of each pixel that an object covers: (B, H, W) in [0, 1], from (B,) centres and radii in pixels."""
    grid = torch.arange(IMAGE_SIZE, dtype=torch.float32) + 0.5
    dx = grid[None, None, :] - x[:, None, None]
    dy = grid[None, :, None] - y[:, None, None]
    return (0.5 - signed_distance(shape, dx, dy, radius[:, None, None])).clamp(0.0, 1.0)


def _stripes(y: Tensor) -> Tensor:
    """Brightness of the bands at every row: (B, H, 1), bright at the object's centre."""
    grid = torch.arange(IMAGE_SIZE, dtype=torch.float32) + 0.5
    phase = (grid[None, :] - y[:, None]) / STRIPE_PERIOD
    triangle_wave = 4.0 * (phase - (phase + 0.5).floor()).abs()  # 0 at a bright centre, 2 at a dark one
    dark = ((triangle_wave - 1.0) * STRIPE_PERIOD / 4.0 + 0.5).clamp(0.0, 1.0)
    return (1.0 - dark * (1.0 - DARK_BAND))[:, :, None]


def render(scenes: Sequence[Scene]) -> Tensor:
    """Draw scenes as (B, 3, 64, 64) float32 pictures in [0, 1]. The same scenes give the same pictures."""
    if not scenes:
        return torch.empty(0, 3, IMAGE_SIZE, IMAGE_SIZE)
    levels = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes])
    pictures = levels[:, None, None, None].expand(-1, 3, IMAGE_SIZE, IMAGE_SIZE).clone()
    groups: dict[tuple[int, str], list[int]] = {}
    for row, scene in enumerate(scenes):
        for layer, thing in enumerate(scene.things):
            groups.setdefault((layer, thing.shape), []).append(row)
    for layer, shape in sorted(groups):
        rows = groups[layer, shape]
        things = [scenes[row].things[layer] for row in rows]
        x, y, radius = torch.tensor([(thing.x, thing.y, thing.radius) for thing in things]).unbind(1)
        cover = coverage(shape, x, y, radius)[:, None]  # (b, 1, H, W)
        striped = torch.tensor([thing.pattern == "striped" for thing in things])
        shade = torch.where(striped[:, None, None], _stripes(y), torch.ones(1, IMAGE_SIZE, 1))[:, None]
        color = torch.tensor([COLORS[thing.color] for thing in things])[:, :, None, None]
        pictures[rows] = pictures[rows] * (1.0 - cover) + color * shade * cover
    vividness = torch.tensor([scene.vividness for scene in scenes])[:, None, None, None]
    return 0.5 + (pictures - 0.5) * vividness
