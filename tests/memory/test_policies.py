"""Checkpoint policies: pure data that covers every step once; and the cost model."""

import pytest
import torch

from fastcraft.memory.cost import count_flops, parameter_counts, step_flops
from fastcraft.memory.policies import POLICIES
from fastcraft.records import CheckpointPlan


@pytest.mark.parametrize("name", POLICIES.names())
@pytest.mark.parametrize("depth", [1, 5, 50])
def test_every_policy_covers_every_step_once(name, depth):
    plan = POLICIES.get(name)().plan(depth, decode_micro_batch=3)
    assert len(plan.steps) == depth
    assert plan.decode_micro_batch == 3


def test_unknown_treatment_is_refused():
    with pytest.raises(ValueError, match="a treatment is 'keep' or 'recompute', got 'forget'"):
        CheckpointPlan(steps=("forget",))


def test_flops_are_counted_without_running():
    linear = torch.nn.Linear(64, 32).requires_grad_(False)
    assert count_flops(linear, (8, 64)) == (2 * 8 * 64 * 32, 2 * 8 * 64 * 32)


def test_step_flops_add_up():
    flops = step_flops(
        (10, 20), (3, 4), samples=2, num_inference_steps=6, backprop_steps=2, guided=True, recompute=True
    )
    assert flops == {"prefix": 4 * 4 * 10, "steps with gradient": 4 * 2 * (2 * 10 + 20), "decode": 2 * (2 * 3 + 4)}


def test_parameter_counts():
    assert parameter_counts(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2).requires_grad_(False)) == (8, 6)
