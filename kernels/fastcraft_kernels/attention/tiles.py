"""Which head widths the kernels know, how they are cut, and the tile each kernel uses on each architecture.

A head width is cut into two powers of two, because Triton's tiles must be: padding 40 to 64 would waste 37 % of every
product, 80 to 128 and 160 to 256 as much. The tiles are the ones that compile without spilling; which of those is
fastest is unmeasured.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class HeadSplit:
    """Head width = ``head`` + ``tail`` columns.

    ``tail`` is the tail's width where it is summed over (16 is the least a tensor core takes; what is beyond the head
    width reads as zero), ``tail_out`` its width where it is a result.
    """

    head: int
    tail: int
    tail_out: int


HEAD_SPLITS = {
    40: HeadSplit(head=32, tail=16, tail_out=8),
    64: HeadSplit(head=64, tail=0, tail_out=0),
    80: HeadSplit(head=64, tail=16, tail_out=16),
    160: HeadSplit(head=128, tail=32, tail_out=32),
}


@dataclass(frozen=True, kw_only=True)
class Tile:
    """``rows`` of the side a program owns, ``steps`` rows of the other side at a time.

    ``descriptor``: tiles come by tensor descriptors (TMA) instead of pointers.
    """

    rows: int
    steps: int
    num_warps: int
    num_stages: int
    descriptor: bool = False


def _tile(rows: int, steps: int, num_warps: int, num_stages: int) -> Tile:
    return Tile(rows=rows, steps=steps, num_warps=num_warps, num_stages=num_stages)


def _descriptor(rows: int, steps: int, num_warps: int, num_stages: int) -> Tile:
    return Tile(rows=rows, steps=steps, num_warps=num_warps, num_stages=num_stages, descriptor=True)


# architecture -> head width -> kernel -> tile
TILES = {
    80: {
        40: {"forward": _tile(128, 64, 4, 3), "dq": _tile(128, 64, 8, 2), "dkdv": _tile(128, 64, 8, 2)},
        64: {"forward": _tile(128, 64, 4, 3), "dq": _tile(128, 64, 8, 2), "dkdv": _tile(128, 64, 8, 2)},
        80: {"forward": _tile(128, 128, 8, 2), "dq": _tile(128, 64, 8, 2), "dkdv": _tile(128, 64, 8, 2)},
        160: {"forward": _tile(64, 32, 4, 2), "dq": _tile(64, 32, 8, 2), "dkdv": _tile(64, 16, 8, 2)},
    },
    90: {
        40: {
            "forward": _descriptor(128, 128, 8, 2),
            "dq": _descriptor(128, 64, 8, 2),
            "dkdv": _descriptor(128, 64, 8, 2),
        },
        64: {
            "forward": _descriptor(128, 128, 8, 2),
            "dq": _descriptor(128, 64, 8, 2),
            "dkdv": _descriptor(128, 64, 8, 2),
        },
        80: {
            "forward": _descriptor(128, 128, 8, 2),
            "dq": _descriptor(128, 64, 8, 2),
            "dkdv": _descriptor(128, 64, 8, 2),
        },
        160: {
            "forward": _descriptor(64, 64, 4, 3),
            "dq": _descriptor(64, 32, 4, 2),
            "dkdv": _descriptor(64, 16, 8, 2),
        },
    },
}
FLOAT32 = _tile(32, 32, 8, 1)  # no tensor core keeps float32: every product is plain arithmetic
FLOAT32_TILES = {("dq", 160): _tile(16, 16, 8, 1), ("dkdv", 160): _tile(32, 16, 8, 1)}
"""Kernel and head width for which that spills: 36 and 928 bytes on sm90 (Triton 3.9)."""


def tile_for(kernel: str, *, arch: int, head_dim: int, dtype: torch.dtype) -> Tile:
    """The tile of ``kernel`` (``"forward"``, ``"dq"``, ``"dkdv"``) on ``arch``; newer cards use the newest row."""
    if dtype == torch.float32:
        return FLOAT32_TILES.get((kernel, head_dim), FLOAT32)
    return TILES[90 if arch >= 90 else 80][head_dim][kernel]
