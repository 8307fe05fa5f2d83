"""GEGLU on the doubled width of a feed-forward."""

import pytest
import torch.nn.functional as F

from benchmarks.kernels.harness import DIRECTIONS, compiled, measure
from benchmarks.kernels.shapes import token_workloads
from fastcraft_kernels.geglu import geglu


def eager(x):
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


PROVIDERS = {"eager": eager, "torch.compile": compiled(eager), "ours": geglu}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("workload", token_workloads(gated=True), ids=str)
def test_geglu(benchmark, machine, workload, direction, provider):
    measure(
        benchmark, machine, op="geglu", provider=provider, function=PROVIDERS[provider], workload=workload,
        direction=direction,
    )  # fmt: skip
