"""Self-attention at the models' head widths."""

import pytest

from benchmarks.kernels.attention_providers import OTHERS
from benchmarks.kernels.harness import DIRECTIONS, measure
from benchmarks.kernels.shapes import attention_workloads
from fastcraft_kernels.attention import attention


def ours(q, k, v):
    return attention(q, k, v, backend="triton" if q.is_cuda else "reference")


PROVIDERS = {**OTHERS, "ours": ours, "dispatched": attention}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("workload", attention_workloads(keys=0), ids=str)
def test_attention(benchmark, machine, workload, direction, provider):
    measure(
        benchmark, machine, op="attention", provider=provider, function=PROVIDERS[provider], workload=workload,
        direction=direction,
    )  # fmt: skip
