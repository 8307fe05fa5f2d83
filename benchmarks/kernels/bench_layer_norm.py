"""Residual add and LayerNorm, both results used."""

import pytest
import torch.nn.functional as F

from benchmarks.kernels.harness import DIRECTIONS, compiled, measure
from benchmarks.kernels.shapes import token_workloads
from fastcraft_kernels.layer_norm import layer_norm


def eager(x, weight, bias, residual):
    total = x + residual
    return total, F.layer_norm(total, total.shape[-1:], weight, bias, 1e-5)


def ours(x, weight, bias, residual):
    return layer_norm(x, weight, bias, eps=1e-5, residual=residual)


PROVIDERS = {"eager": eager, "torch.compile": compiled(eager), "ours": ours}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("workload", token_workloads(gated=False), ids=str)
def test_layer_norm(benchmark, machine, workload, direction, provider):
    measure(
        benchmark, machine, op="layer_norm", provider=provider, function=PROVIDERS[provider], workload=workload,
        direction=direction,
    )  # fmt: skip
