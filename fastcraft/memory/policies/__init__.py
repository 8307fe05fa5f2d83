"""The checkpoint policies' catalogue: each turns a number of steps with gradient into a `CheckpointPlan`.

A policy is a class with ``plan(backprop_steps, *, decode_micro_batch=0)``. One that takes an argument, written behind a
colon, receives it as a string on construction and shows a valid name in ``example``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from fastcraft.errors import UserError
from fastcraft.memory.plan import OFFLOAD, CheckpointPlan
from fastcraft.registry import Registry

POLICIES = Registry(
    "policy",
    {
        "none": "fastcraft.memory.policies.none:KeepAll",
        "step": "fastcraft.memory.policies.step:RecomputeSteps",
        "step+block": "fastcraft.memory.policies.block:RecomputeBlocks",
        "sac": "fastcraft.memory.policies.selective:SaveOps",
        "offload": "fastcraft.memory.policies.selective:OffloadOps",
        "segment": "fastcraft.memory.policies.segment:RecomputeSegments",
        "batched": "fastcraft.memory.policies.batched:BatchSteps",
        "last_k_live": "fastcraft.memory.policies.last_k_live:KeepLast",
        "plan": "fastcraft.memory.policies.explicit:ExplicitPlan",
    },
)


def make_policy(name: str) -> Any:
    """The policy of a recipe's ``memory.policy``.

    Args:
        name: a catalogue name, with ``:argument`` where the policy takes one; or a user's own ``"module:Class"``.

    Raises:
        UserError: no such policy, an argument missing or not asked for, or one that the policy refuses.
    """
    head, colon, argument = name.partition(":")
    if colon and head not in POLICIES.entries:
        return POLICIES.get(name)()
    policy = POLICIES.get(head)
    example = getattr(policy, "example", "")
    if not example:
        if colon:
            raise UserError(f"{head!r} takes no argument, got {name!r}")
        return policy()
    if not argument:
        raise UserError(f"{head!r} needs an argument, for example {example!r}, got {name!r}")
    return policy(argument)


def plan_maker(
    name: str, *, backprop_steps: int, decode_micro_batch: int, device_type: str, input_grad: bool = True
) -> Callable[[int], CheckpointPlan]:
    """A function from the number of steps with gradient to the plan, checked for the K and the device of a run.

    Args:
        name: see `make_policy`.
        backprop_steps: K; a draw of the truncation may ask for another number.
        decode_micro_batch: images decoded at once; 0 = the whole batch.
        device_type: ``"cpu"`` or ``"cuda"``.
        input_grad: see `Trajectory`.

    Raises:
        UserError: see `make_policy`; an explicit plan of another length; offloading where there is no second memory;
            steps in one batch that depend on each other.
    """
    policy = make_policy(name)
    length = getattr(policy, "num_steps", backprop_steps)
    if length != backprop_steps:
        raise UserError(f"the plan must name {backprop_steps} steps with gradient, got {length}")
    make: Callable[[int], CheckpointPlan] = partial(policy.plan, decode_micro_batch=decode_micro_batch)
    plan = make(backprop_steps)
    if plan.batched and input_grad:
        raise UserError(
            f"{name!r} needs a stop-gradient on the UNet's input (input_grad = false): without one every step's "
            "backward waits for the next one's; 'step' takes as little memory"
        )
    offloaded = [t for t in (*plan.steps, plan.decode) if t.startswith(OFFLOAD)]
    if offloaded and device_type != "cuda":
        raise UserError(
            f"{offloaded[0]!r} needs a CUDA device; on a {device_type} nothing can move out of the way, "
            f"and 'sac:{offloaded[0].removeprefix(OFFLOAD)}' keeps the same"
        )
    return make


def count(name: str, text: str) -> int:
    """A policy's argument as a number of steps, at least 1.

    Raises:
        UserError: anything else.
    """
    if not (text.isdecimal() and int(text) >= 1):
        raise UserError(f"{name!r} needs a number of steps, at least 1, got {text!r}")
    return int(text)
