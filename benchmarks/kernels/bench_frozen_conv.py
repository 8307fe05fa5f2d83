"""A frozen 3x3 convolution: the same cuDNN kernels; what differs is what autograd keeps, and Python."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.kernels.harness import DIRECTIONS, Inputs, Workload, measure
from benchmarks.kernels.shapes import picture, sizes_of
from fastcraft_kernels.frozen_conv import frozen_conv2d


def eager(x, weight, bias):
    return F.conv2d(x, weight, bias, padding=1)


def ours(x, weight, bias):
    return frozen_conv2d(x, weight, bias, padding=1)


def make(n, c, size):
    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        weight = torch.randn(c, c, 3, 3, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
        bias = torch.randn(c, device=device).to(dtype)
        return {"x": picture(n, c, size, device, dtype), "weight": weight, "bias": bias}

    return inputs


ROWS = sizes_of(
    gpu=[("sd15@512 64x64 C320 N8", 8, 320, 64), ("sd15@512 16x16 C1280 N2", 2, 1280, 16)],
    cpu=[("small 8x8 C32 N2", 2, 32, 8)],
)
WORKLOADS = [
    Workload(
        name=name, make=make(n, c, s), flops=(18 * n * c * c * s * s, 36 * n * c * c * s * s),
        num_elements=(2 * n * c * s * s + 9 * c * c, 4 * n * c * s * s + 18 * c * c),
    )
    for name, n, c, s in ROWS
]  # fmt: skip
PROVIDERS = {"eager": eager, "ours": ours}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_frozen_conv(benchmark, machine, workload, direction, provider):
    measure(
        benchmark, machine, op="frozen_conv2d", provider=provider, function=PROVIDERS[provider], workload=workload,
        direction=direction,
    )  # fmt: skip
