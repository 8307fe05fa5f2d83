"""Cross-attention over the 77 tokens of a prompt; of guided batches too, whose unconditional half shares its text."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.kernels.attention_providers import OTHERS
from benchmarks.kernels.harness import DIRECTIONS, measure
from benchmarks.kernels.shapes import attention_workloads
from fastcraft_kernels.cross_attention import cross_attention

PROVIDERS = {**OTHERS, "ours": cross_attention}


def with_copies(attend: Callable[..., Any]) -> Callable[..., Any]:
    """``attend`` where the shared row of keys and values is copied for every sample that reads it."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        shared = q.shape[0] - k.shape[0] + 1
        return attend(q, *(torch.cat([x[:1].expand(shared, -1, -1, -1), x[1:]]) for x in (k, v)))

    return call


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Ours, reading the shared row where it is."""
    return cross_attention(q, k, v, num_shared=q.shape[0] - k.shape[0] + 1)


GUIDED_PROVIDERS = {
    **{name: with_copies(attend) for name, attend in OTHERS.items()},
    "ours, with copies": with_copies(cross_attention),
    "ours": in_place,
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("workload", attention_workloads(keys=77), ids=str)
def test_cross_attention(benchmark, machine, workload, direction, provider):
    measure(
        benchmark, machine, op="cross_attention", provider=provider, function=PROVIDERS[provider], workload=workload,
        direction=direction,
    )  # fmt: skip


@pytest.mark.parametrize("provider", GUIDED_PROVIDERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("workload", attention_workloads(keys=77, guided=True), ids=str)
def test_guided_cross_attention(benchmark, machine, workload, direction, provider):
    measure(
        benchmark, machine, op="guided_cross_att", provider=provider, function=GUIDED_PROVIDERS[provider],
        workload=workload, direction=direction,
    )  # fmt: skip
