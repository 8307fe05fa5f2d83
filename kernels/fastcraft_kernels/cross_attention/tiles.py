"""How keys and queries are cut for cross-attention, and the tile each kernel uses on each architecture."""

from dataclasses import dataclass

import torch

from fastcraft_kernels.attention.tiles import Tile
from fastcraft_kernels.launch import DeviceFacts, ceil_div, next_power_of_2, split_count

MAX_KEYS = 512
ONE_BLOCK = 128  # the most keys in one block
STEP_KEYS = 64  # of longer text at a time
STEP_KEYS_FLOAT32 = 32
LOOPED = {(80, "dq", 160)}
"""Architecture, kernel and head width where more than `STEP_KEYS` are a loop, because one block does not fit a
program's registers: for 64 queries it spills 828 bytes with 77 keys and 1616 with 128. It fits for 16 queries at a time
only, which would load every key four times as often."""
TWO_PIECES = {40: 96, 64: 96}
"""Head width -> the most keys that dK/dV takes in two pieces; else a block is one piece, of up to 128 rows. For 77 keys
at head width 80 two pieces spill 12664 bytes on sm80 and 1212 on sm90, one piece none with 183 and 180 registers; at
head width 160 none and 268, against none with 247 and 213."""


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


def key_blocks(num_keys: int, *, kernel: str, arch: int, head_dim: int, dtype: torch.dtype) -> KeyBlocks:
    """Blocks of 1 to 512 keys for ``"forward"``, ``"dq"`` or ``"dkdv"``.

    Up to `ONE_BLOCK` keys are one block, where registers allow the least sum of two powers of two from 16 that holds
    them: 77 keys as 64 + 16 waste 4 % where 128 waste 40 %. More are a loop over blocks of 64; for dK/dV, which reads
    all queries for every block, programs of 128 each. The exceptions are what Triton 3.9 makes of the tiles below.
    """
    if dtype == torch.float32:
        return _blocks(num_keys, STEP_KEYS_FLOAT32, 0)
    first = min(STEP_KEYS, max(16, next_power_of_2(num_keys + 1) // 2))
    if num_keys <= first:
        return _blocks(num_keys, first, 0)
    rest = max(16, next_power_of_2(num_keys - first))
    if kernel == "dkdv" and first + rest > TWO_PIECES.get(head_dim, 0):
        return _blocks(num_keys, min(ONE_BLOCK, next_power_of_2(num_keys)), 0)
    if num_keys > ONE_BLOCK or (_row(arch), kernel, head_dim) in LOOPED:
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
        80: {"forward": _tile(128, 8, 2), "dq": _tile(128, 8, 2), "dkdv": _tile(32, 8, 2)},
        160: {"forward": _tile(64, 4, 2), "dq": _tile(64, 8, 2), "dkdv": _tile(16, 8, 2)},
    }
    for arch in (80, 90)
}
LOOP_TILES = {(80, "forward", 160): _tile(64, 8, 2)}
"""Instead of the above in a loop over blocks: what keeps one block in registers spills 80 bytes there, what keeps the
loop 16 bytes of one block."""
FLOAT32 = _tile(32, 8, 1)
FLOAT32_TILES = {("forward", 160): _tile(16, 8, 1), ("dkdv", 160): _tile(16, 8, 1), ("dkdv", 80): _tile(16, 4, 1)}
"""Kernel and head width for which 32 rows spill: 216 and 632 bytes on sm90, 12 on sm80."""


def _row(arch: int) -> int:
    """Newer cards use the newest row."""
    return 90 if arch >= 90 else 80


def query_tile(kernel: str, *, arch: int, head_dim: int, dtype: torch.dtype, num_blocks: int) -> Tile:
    """The tile of ``kernel`` (``"forward"``, ``"dq"``, ``"dkdv"``) on ``arch`` for so many blocks of keys."""
    if dtype == torch.float32:
        return FLOAT32_TILES.get((kernel, head_dim), FLOAT32)
    tile = TILES[_row(arch)][head_dim][kernel]
    return tile if num_blocks == 1 else LOOP_TILES.get((_row(arch), kernel, head_dim), tile)


def split_queries(facts: DeviceFacts, *, num_queries: int, num_heads: int, blocks: int, rows: int) -> tuple[int, int]:
    """Into how many splits dK/dV cuts the queries, and the queries of each, a multiple of ``rows``.

    ``num_heads`` counts those of all samples. One program fills a multiprocessor's registers; more than 8 splits, or
    splits of fewer than 128 queries, would write more partial sums than there is to read.
    """
    splits = split_count(facts.num_sms, num_heads * blocks, most=max(1, min(8, num_queries // 128)))
    size = ceil_div(ceil_div(num_queries, splits), rows) * rows
    return ceil_div(num_queries, size), size
