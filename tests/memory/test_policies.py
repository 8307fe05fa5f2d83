"""Checkpoint policies: pure data that covers every step once."""

import pytest
import torch

from fastcraft.errors import UserError
from fastcraft.memory.plan import KEEP, RECOMPUTE, RECOMPUTE_BLOCKS, CheckpointPlan
from fastcraft.memory.policies import POLICIES, make_policy, plan_maker

NAMES = [
    getattr(POLICIES.get(name), "example", "") or name for name in POLICIES.names() if name != "auto"
]  # auto weighs costs, see test_planner.py


def plans(name, depth, **options):
    options = {
        "backprop_steps": depth, "decode_micro_batch": 0, "device_type": "cuda", "input_grad": False, **options
    }  # fmt: skip
    return plan_maker(name, **options)(depth)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("depth", [1, 5, 50])
def test_every_policy_covers_every_step_once(name, depth):
    plan = make_policy(name).plan(depth, decode_micro_batch=3)
    assert len(plan.steps) == depth
    assert sum(plan.segments) in (0, depth)
    assert plan.decode_micro_batch == 3


@pytest.mark.parametrize(
    ("name", "steps", "segments", "decode"),
    [
        ("none", (KEEP,) * 5, (), KEEP),
        ("step", (RECOMPUTE,) * 5, (), RECOMPUTE),
        ("step+block", (RECOMPUTE_BLOCKS,) * 5, (), RECOMPUTE_BLOCKS),
        ("sac:attention+conv", ("sac:attention+conv",) * 5, (), RECOMPUTE),
        ("offload:attention", ("offload:attention",) * 5, (), RECOMPUTE),
        ("segment:2", (KEEP,) * 5, (1, 2, 2), RECOMPUTE),
        ("segment:9", (KEEP,) * 5, (5,), RECOMPUTE),
        ("batched:2", (RECOMPUTE,) * 5, (), RECOMPUTE),
        ("last_k_live:2", (RECOMPUTE,) * 3 + (KEEP,) * 2, (), RECOMPUTE),
        ("last_k_live:7", (KEEP,) * 5, (), RECOMPUTE),
        ("plan:2*recompute, sac:conv,2*keep", (RECOMPUTE, RECOMPUTE, "sac:conv", KEEP, KEEP), (), RECOMPUTE),
    ],
)
def test_what_each_policy_says(name, steps, segments, decode):
    plan = plans(name, 5)
    assert (plan.steps, plan.segments, plan.decode) == (steps, segments, decode)


def test_a_decode_in_micro_batches_is_kept():
    assert plans("step", 2, decode_micro_batch=1).decode == KEEP


def test_a_plan_is_aligned_to_the_last_step_when_a_draw_has_another_depth():
    policy = make_policy("plan:recompute,sac:conv,keep")
    assert policy.plan(2).steps == ("sac:conv", KEEP)
    assert policy.plan(5).steps == (RECOMPUTE, RECOMPUTE, RECOMPUTE, "sac:conv", KEEP)


def test_a_user_may_bring_a_policy():
    assert plans("fastcraft.memory.policies.none:KeepAll", 2).steps == (KEEP, KEEP)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stop", "^unknown policy 'stop'; did you mean 'step'"),
        ("step:3", "'step' takes no argument, got 'step:3'"),
        ("sac", "'sac' needs an argument, for example 'sac:attention\\+conv', got 'sac'"),
        ("sac:", "'sac' needs an argument"),
        ("sac:attn+conv", "'sac:attn\\+conv': an op is one of attention, conv, .*; got 'attn'"),
        ("sac:conv+", "got ''"),
        ("segment:0", "'segment' needs a number of steps, at least 1, got '0'"),
        ("batched:0", "'batched' needs a number of steps, at least 1, got '0'"),
        ("last_k_live:two", "'last_k_live' needs a number of steps, at least 1, got 'two'"),
        ("plan:keep,forget", "plan: a treatment is 'keep', .* got 'forget'"),
        ("plan:keep,", "plan: a treatment is 'keep', .* got ''"),
        ("plan:0*keep", "got '0\\*keep'"),
        ("plan:2*keep", "the plan must name 5 steps with gradient, got 2"),
        ("no.such.module:Policy", "cannot load 'no.such.module:Policy'"),
    ],
)
def test_bad_names_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        plans(name, 5)


@pytest.mark.parametrize("name", ["offload:attention+conv", "plan:4*recompute,offload:attention+conv"])
def test_offloading_without_a_second_memory_is_refused_with_the_reason(name):
    with pytest.raises(UserError, match=r"needs a CUDA device; on a cpu .* and 'sac:attention\+conv' keeps the same"):
        plans(name, 5, device_type="cpu")


def test_batches_are_no_larger_than_the_chain():
    assert [plans("batched:4", depth).batched for depth in (2, 4, 9)] == [2, 4, 4]


def test_steps_that_depend_on_each_other_are_not_batched():
    with pytest.raises(UserError, match=r"'batched:2' needs .* \(input_grad = false\): .*'step' takes as little"):
        plans("batched:2", 5, input_grad=True)


def test_a_registered_fused_op_is_a_kind_of_its_own():
    with torch.library._scoped_library("fastcraft", "FRAGMENT") as library:
        library.define("policy_probe(Tensor x) -> Tensor")
        assert plans("sac:conv+policy_probe", 1).steps == ("sac:conv+policy_probe",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": ("forget",)}, "a treatment is 'keep', .* got 'forget'"),
        ({"steps": (KEEP,), "decode": "drop"}, "got 'drop'"),
        ({"steps": (KEEP,) * 3, "segments": (2, 2)}, "segments must be at least 1 and add up to 3 steps"),
        ({"steps": (KEEP,) * 2, "segments": (2, 0)}, "segments must be at least 1"),
        ({"steps": (RECOMPUTE, KEEP), "batched": 2}, "batched must be 0, or at least 1 with every step 'recompute'"),
        ({"steps": (RECOMPUTE,) * 2, "batched": -1}, "batched must be 0, or at least 1 .*, got -1"),
        ({"steps": (KEEP, "sac:conv"), "segments": (2,)}, "what a step inside it keeps would be dropped"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CheckpointPlan(**options)
