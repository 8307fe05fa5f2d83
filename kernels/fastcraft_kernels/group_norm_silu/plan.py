"""How a plane is cut into programs: one launch where a group fits in registers, two launches otherwise."""

import math
from dataclasses import dataclass

from fastcraft_kernels.launch import DeviceFacts, ceil_div, next_power_of_2, split_count

TILE_CHANNELS = 64  # 128 bytes of a 16-bit row; every GroupNorm width of Stable Diffusion is a multiple
TILE_ROWS = 32
PROGRAMS_PER_SM = 4  # of four warps with 128 registers a thread
MAX_SPLITS = 128
SMALL_PLANE_ROWS = 256
SMALL_TILE_ELEMENTS = 16_384  # what sixteen warps hold twice (x and dy) in registers
LINE_BYTES = 128
VECTOR_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class SmallPlan:
    """One launch: a program owns ``num_owned`` whole groups of one sample, all rows."""

    num_owned: int
    tile_rows: int
    tile_channels: int
    num_warps: int


@dataclass(frozen=True, kw_only=True)
class SplitPlan:
    """Two launches: partial sums over (channel tile, split of the rows, sample), then apply on the same grid.

    ``num_splits`` pieces of ``split_rows`` rows (the last may be shorter), padded to the power of two ``max_splits``
    where they are merged; a tile meets at most ``max_groups`` groups (a power of two).
    """

    tile_rows: int
    tile_channels: int
    num_tiles: int
    num_splits: int
    max_splits: int
    split_rows: int
    max_groups: int
    num_warps: int


def make_plan(
    facts: DeviceFacts, num_samples: int, num_rows: int, num_channels: int, *, num_groups: int, itemsize: int
) -> SmallPlan | SplitPlan:
    """Choose the form and its tiles for ``num_samples`` planes of ``num_rows`` pixels and ``num_channels`` channels."""
    width = num_channels // num_groups
    rows = next_power_of_2(num_rows)
    if num_rows <= SMALL_PLANE_ROWS and rows * next_power_of_2(width) <= SMALL_TILE_ELEMENTS:
        return _small_plan(facts, num_samples, rows, width, num_groups, itemsize)
    tile_channels = min(TILE_CHANNELS, next_power_of_2(num_channels))
    num_tiles = ceil_div(num_channels, tile_channels)
    tile_rows = min(TILE_ROWS, rows)
    # Every program merges the partials of all splits: more of them than this and the merge outweighs the rows.
    most = min(math.isqrt(num_rows // 8), MAX_SPLITS)
    splits = split_count(PROGRAMS_PER_SM * facts.num_sms, num_tiles * num_samples, most=most)
    split_rows = ceil_div(ceil_div(num_rows, splits), tile_rows) * tile_rows
    latest_start = width - math.gcd(tile_channels, width)  # of a tile within a group, in channels
    met = (latest_start + tile_channels - 1) // width + 1
    num_splits = ceil_div(num_rows, split_rows)
    return SplitPlan(
        tile_rows=tile_rows,
        tile_channels=tile_channels,
        num_tiles=num_tiles,
        num_splits=num_splits,
        max_splits=next_power_of_2(num_splits),
        split_rows=split_rows,
        max_groups=next_power_of_2(met),
        num_warps=max(1, tile_rows * tile_channels // 512),
    )


def _small_plan(
    facts: DeviceFacts, num_samples: int, rows: int, width: int, num_groups: int, itemsize: int
) -> SmallPlan:
    def may_double(owned: int) -> bool:
        return num_groups % (2 * owned) == 0 and rows * next_power_of_2(2 * owned * width) <= SMALL_TILE_ELEMENTS

    owned = 1
    while owned * width * itemsize % VECTOR_BYTES and may_double(owned):
        owned *= 2
    # A row narrower than a line wastes part of every line it reads, but an idle multiprocessor wastes more.
    while (
        owned * width * itemsize < LINE_BYTES
        and num_samples * num_groups // (2 * owned) >= facts.num_sms
        and may_double(owned)
    ):
        owned *= 2
    channels = next_power_of_2(owned * width)
    return SmallPlan(
        num_owned=owned,
        tile_rows=rows,
        tile_channels=channels,
        num_warps=max(1, min(16, rows * channels // 1024)),
    )
