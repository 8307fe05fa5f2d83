"""Cross-attention over the 77 tokens of a prompt."""

import pytest

from benchmarks.kernels.attention_providers import OTHERS
from benchmarks.kernels.harness import DIRECTIONS, measure
from benchmarks.kernels.shapes import attention_workloads
from fastcraft_kernels.cross_attention import cross_attention

PROVIDERS = {**OTHERS, "ours": cross_attention}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("workload", attention_workloads(keys=77), ids=str)
def test_cross_attention(benchmark, machine, workload, direction, provider):
    measure(
        benchmark, machine, op="cross_attention", provider=provider, function=PROVIDERS[provider], workload=workload,
        direction=direction,
    )  # fmt: skip
