"""Which attention a CPU should take: ``OMP_NUM_THREADS=1 python -m benchmarks.cpu_attention [--out FILE]``.

PyTorch's fused attention against the plain product, forward and backward, in turn, at the bundled model's shapes; the
answer stands in `fastcraft.diffusion.attention`.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcraft.evaluation.environment import environment

SHAPES = {"self 64 tokens": (64, 64, 20), "self 16 tokens": (16, 16, 40), "text": (64, 77, 20)}
"""Queries, keys, head width; 32 rows of 4 heads."""


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As `fastcraft.diffusion.attention` writes it."""
    return (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(dim=-1) @ value


def measure(rounds: int) -> list[dict[str, object]]:
    """Median milliseconds of both, by shape and dtype."""
    rows: list[dict[str, object]] = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, (queries, keys, width) in SHAPES.items():
            inputs = [torch.randn(32, 4, n, width, dtype=dtype, requires_grad=True) for n in (queries, keys, keys)]
            times: dict[str, list[float]] = {"fused": [], "plain": []}
            for number in range(rounds + 3):
                for way, attend in (("fused", F.scaled_dot_product_attention), ("plain", plain)):
                    began = time.perf_counter()
                    attend(*inputs).sum().backward()
                    if number >= 3:
                        times[way].append(1e3 * (time.perf_counter() - began))
            medians = {f"{way}_ms": statistics.median(values) for way, values in times.items()}
            rows.append({"shape": name, "dtype": str(dtype).removeprefix("torch."), **medians})
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    rows = measure(args.rounds)
    for row in rows:
        print(row)
    if args.out:
        document = {"environment": environment(), "threads": torch.get_num_threads(), "rows": rows}
        args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
