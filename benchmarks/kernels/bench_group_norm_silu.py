"""GroupNorm + SiLU with the time embedding's shift, frozen affine: 2n elements forward, 3n backward."""

import pytest
import torch.nn.functional as F

from benchmarks.kernels.harness import DIRECTIONS, compiled, measure
from benchmarks.kernels.shapes import norm_workloads
from fastcraft_kernels.group_norm_silu import group_norm_silu


def eager(x, weight, bias, shift):
    return F.silu(F.group_norm(x + shift[:, :, None, None], 32, weight, bias, 1e-5))


def ours(x, weight, bias, shift):
    return group_norm_silu(x, weight, bias, num_groups=32, eps=1e-5, shift=shift)


PROVIDERS = {"eager": eager, "torch.compile": compiled(eager), "ours": ours}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("workload", norm_workloads(), ids=str)
def test_group_norm_silu(benchmark, machine, workload, direction, provider):
    measure(
        benchmark, machine, op="group_norm_silu", provider=provider, function=PROVIDERS[provider], workload=workload,
        direction=direction,
    )  # fmt: skip
