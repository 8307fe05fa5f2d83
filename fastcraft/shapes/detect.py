"""Find the objects of a picture with plain image processing: hue classes, connected components, template overlap."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d

from fastcraft.shapes.render import CROSS_ARM, coverage
from fastcraft.shapes.scenes import COLORS, IMAGE_SIZE, RADIUS, SHAPES

MIN_AREA = 30
"""Pixels: less is no object. The smallest object that is ever drawn has about 80."""

MIN_OVERLAP = 0.60
"""Intersection over union with the best template that a blob must reach to count as that shape."""

SOFT_PASSES = (2, 3)
"""How often templates are averaged over 3x3 pixels, one lot after the other, to stand for what an autoencoder blurs."""

SOFT_SCALES = (1.0, 1.08, 1.16)
"""Radii of softened templates, as multiples of the sharp shape's of the same area: softening takes corners away."""

SIZE_BORDER = (RADIUS["small"][1] + RADIUS["large"][0]) / 2.0

STRIPE_CONTRAST = 0.22
"""A blob is striped when its rows' colorfulness varies by at least this share."""

# Area and centroid (below the box's centre) of each shape of radius 1.
_AREA = {"circle": math.pi, "square": 4.0, "triangle": 2.0, "cross": 8.0 * CROSS_ARM - 4.0 * CROSS_ARM**2}
_DROP = {"circle": 0.0, "square": 0.0, "triangle": 1.0 / 3.0, "cross": 0.0}


@dataclass(frozen=True, slots=True)
class Blob:
    """One object as seen."""

    color: str
    shape: str | None
    """None: like no shape that the world has."""
    size: str
    pattern: str
    x: float
    y: float
    area: int
    overlap: float
    """Intersection over union with the best template."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """Everything seen in one picture."""

    blobs: tuple[Blob, ...]
    background: str | None
    """None: too colorful to be any of the backgrounds."""


def _classify_pixels(images: Tensor) -> tuple[Tensor, Tensor]:
    """Chroma and color class, both (B, H, W): the class is the index of the nearest hue, -1 without enough color."""
    palette = torch.tensor(list(COLORS.values()))
    opponent = torch.tensor([[1.0, -0.5, -0.5], [0.0, 3.0**0.5 / 2.0, -(3.0**0.5) / 2.0]])
    plane = torch.einsum("oc,bchw->bohw", opponent, images)
    chroma = plane.norm(dim=1)
    hues = torch.nn.functional.normalize(palette @ opponent.T, dim=1)
    nearest = torch.einsum("ko,bohw->bkhw", hues, plane).argmax(1)
    strongest = chroma.flatten(1).topk(40, dim=1).values.mean(1)
    floor = (0.28 * strongest).clamp(min=0.08)[:, None, None]
    return chroma, torch.where(chroma > floor, nearest, -1)


def _components(classes: Tensor) -> list[tuple[int, Tensor]]:
    """Class and mask (H, W) of every 4-connected part of one color class that has at least `MIN_AREA` pixels."""
    rows, width = classes.tolist(), classes.shape[1]
    runs: list[tuple[int, int, int, int]] = []  # row, first column, end column, class
    parent: list[int] = []

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    above: list[int] = []
    for y, row in enumerate(rows):
        here: list[int] = []
        x = 0
        while x < width:
            end = x + 1
            while end < width and row[end] == row[x]:
                end += 1
            if row[x] >= 0:
                index = len(runs)
                runs.append((y, x, end, row[x]))
                parent.append(index)
                for other in above:
                    _, start, stop, kind = runs[other]
                    if kind == row[x] and start < end and stop > x:
                        parent[root(other)] = root(index)
                here.append(index)
            x = end
        above = here
    parts: dict[int, list[int]] = {}
    for index in range(len(runs)):
        parts.setdefault(root(index), []).append(index)
    blobs = []
    for members in parts.values():
        if sum(runs[index][2] - runs[index][1] for index in members) >= MIN_AREA:
            mask = torch.zeros(classes.shape, dtype=torch.bool)
            for y, start, stop, _ in (runs[index] for index in members):
                mask[y, start:stop] = True
            blobs.append((runs[members[0]][3], mask))
    return blobs


def _templates(x: float, y: float, area: float) -> tuple[Tensor, list[tuple[str, float]]]:
    """Masks (N, H, W) of every shape of about this area and centroid, sharp and soft; each one's shape and radius."""
    masks, labels = [], []
    for shape in SHAPES:
        radii = [factor * math.sqrt(area / _AREA[shape]) for factor in (1.0, *SOFT_SCALES)]
        centers = [y - _DROP[shape] * radius for radius in radii]
        covers = coverage(shape, torch.full((len(radii),), x), torch.tensor(centers), torch.tensor(radii))
        soft, versions = covers[1:, None], [covers[:1]]
        for passes in SOFT_PASSES:
            for _ in range(passes):
                soft = avg_pool2d(soft, 3, 1, 1)
            versions.append(soft[:, 0])
        masks.append(torch.cat(versions) > 0.5)
        labels += [(shape, radius) for radius in (radii[0], *radii[1:] * len(SOFT_PASSES))]
    return torch.cat(masks), labels


def _match_shape(mask: Tensor) -> tuple[str | None, float, float, float, float]:
    """Best shape, its radius, box centre x and y, and overlap, for one blob's (H, W) mask."""
    ys, xs = torch.nonzero(mask, as_tuple=True)
    x, y = float(xs.float().mean()) + 0.5, float(ys.float().mean()) + 0.5
    templates, labels = _templates(x, y, float(len(xs)))
    overlaps = (templates & mask).sum((1, 2)) / (templates | mask).sum((1, 2))
    best = int(overlaps.argmax())
    (shape, radius), overlap = labels[best], float(overlaps[best])
    return (shape if overlap >= MIN_OVERLAP else None), radius, x, y - _DROP[shape] * radius, overlap


def _is_striped(mask: Tensor, chroma: Tensor) -> bool:
    inside = 1.0 - max_pool2d(1.0 - mask[None, None].float(), 3, 1, 1)[0, 0]
    counts = inside.sum(1)
    rows = ((inside * chroma).sum(1) / counts.clamp(min=1.0))[counts >= 2]
    if len(rows) < 4:
        return False
    bright, dark = float(rows.quantile(0.85)), float(rows.quantile(0.15))
    return bright - dark > STRIPE_CONTRAST * bright


def _background(image: Tensor, chroma: Tensor, classes: Tensor) -> str | None:
    outside = max_pool2d((classes >= 0)[None].float(), 3, 1, 1)[0] == 0
    if outside.sum() < IMAGE_SIZE:
        return None
    if float(chroma[outside].median()) > 0.12:
        return None
    level = float(image.mean(0)[outside].median())
    return "black" if level < 0.385 else "gray" if level < 0.615 else "white"


def look(images: Tensor) -> list[Sighting]:
    """See what each picture contains.

    Args:
        images: (B, 3, 64, 64) floating point, RGB in [0, 1].

    Raises:
        ValueError: the pictures have another shape.
    """
    if images.ndim != 4 or images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"images must be (B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}), got {tuple(images.shape)}")
    images = images.detach().to("cpu", torch.float32).clamp(0.0, 1.0)
    chroma, classes = _classify_pixels(images)
    names = tuple(COLORS)
    sightings = []
    for row, image in enumerate(images):
        blobs = []
        for index, mask in _components(classes[row]):
            shape, radius, x, y, overlap = _match_shape(mask)
            pattern = "striped" if _is_striped(mask, chroma[row]) else "plain"
            size = "small" if radius < SIZE_BORDER else "large"
            blobs.append(Blob(names[index], shape, size, pattern, x, y, int(mask.sum()), overlap))
        sightings.append(Sighting(tuple(blobs), _background(image, chroma[row], classes[row])))
    return sightings
