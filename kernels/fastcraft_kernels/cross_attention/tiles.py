"""How keys and queries are cut for cross-attention, and the tile each kernel uses on each architecture."""

from dataclasses import dataclass

import torch

from fastcraft_kernels.attention.tiles import Tile
from fastcraft_kernels.launch import DeviceFacts, ceil_div, next_power_of_2, split_count

MAX_KEYS = 512
STEP_KEYS = 64  # of longer text at a time
STEP_KEYS_FLOAT32 = 32
ONE_BLOCK = {  # kernel -> head width -> the most keys that fit a program's registers in one block
    "forward": {40: 128, 64: 128, 80: 80, 160: 80},
    "dq": {40: 128, 64: 128, 80: 80, 160: 64},
    "dkdv": {40: 96, 64: 96, 80: 64, 160: 64},
}


@dataclass(frozen=True, kw_only=True)
class KeyBlocks:
    """``count`` blocks of ``first + rest`` keys, both powers of two (``rest`` may be 0).

    ``first_full`` and ``rest_full``: whether no block has missing keys there, so that masks can be left out.
    """

    count: int
    first: int
    rest: int
    first_full: bool
    rest_full: bool


def _blocks(num_keys: int, first: int, rest: int) -> KeyBlocks:
    count = ceil_div(num_keys, first + rest)
    even = num_keys % (first + rest) == 0
    return KeyBlocks(
        count=count, first=first, rest=rest, first_full=even or (count == 1 and num_keys >= first), rest_full=even
    )


def key_blocks(num_keys: int, *, kernel: str, head_dim: int, dtype: torch.dtype) -> KeyBlocks:
    """Blocks of 1 to 512 keys for ``"forward"``, ``"dq"`` or ``"dkdv"``.

    Few keys (`ONE_BLOCK`) are one block, the least sum of two powers of two from 16 that holds them: 77 keys as 64 + 16
    waste 4 % where 128 would waste 40 %. More are a loop over blocks of 64.
    """
    if dtype == torch.float32:
        return _blocks(num_keys, STEP_KEYS_FLOAT32, 0)
    first = min(STEP_KEYS, max(16, next_power_of_2(num_keys + 1) // 2))
    if num_keys <= first:
        return _blocks(num_keys, first, 0)
    rest = max(16, next_power_of_2(num_keys - first))
    if first + rest > ONE_BLOCK[kernel][head_dim]:
        return _blocks(num_keys, STEP_KEYS, 0)
    if rest == first < STEP_KEYS:
        return _blocks(num_keys, 2 * first, 0)
    return _blocks(num_keys, first, rest)


def _tile(rows: int, num_warps: int, num_stages: int) -> Tile:
    return Tile(rows=rows, steps=STEP_KEYS, num_warps=num_warps, num_stages=num_stages)


# architecture -> head width -> kernel -> tile; ``steps`` is what `key_blocks` says
TILES = {
    arch: {
        40: {"forward": _tile(128, 4, 2), "dq": _tile(128, 8, 2), "dkdv": _tile(32, 4, 2)},
        64: {"forward": _tile(128, 4, 2), "dq": _tile(128, 8, 2), "dkdv": _tile(64, 8, 2)},
        80: {"forward": _tile(128, 8, 2), "dq": _tile(128, 8, 2), "dkdv": _tile(32, 4, 2)},
        160: {"forward": _tile(64, 4, 2), "dq": _tile(64, 8, 2), "dkdv": _tile(16, 8, 2)},
    }
    for arch in (80, 90)
}
FLOAT32 = _tile(32, 8, 1)


def query_tile(kernel: str, *, arch: int, head_dim: int, dtype: torch.dtype) -> Tile:
    """The tile of ``kernel`` (``"forward"``, ``"dq"``, ``"dkdv"``) on ``arch``; newer cards use the newest row."""
    if dtype == torch.float32:
        return FLOAT32
    return TILES[90 if arch >= 90 else 80][head_dim][kernel]


def split_queries(facts: DeviceFacts, *, num_queries: int, num_heads: int, blocks: int, rows: int) -> tuple[int, int]:
    """Into how many splits dK/dV cuts the queries, and the queries of each, a multiple of ``rows``.

    ``num_heads`` counts those of all samples. One program fills a multiprocessor's registers; more than 8 splits, or
    splits of fewer than 128 queries, would write more partial sums than there is to read.
    """
    splits = split_count(facts.num_sms, num_heads * blocks, most=max(1, min(8, num_queries // 128)))
    size = ceil_div(ceil_div(num_queries, splits), rows) * rows
    return ceil_div(num_queries, size), size
