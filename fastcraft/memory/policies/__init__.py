"""The checkpoint policies' catalogue: each turns a number of steps with gradient into a `CheckpointPlan`."""

from fastcraft.registry import Registry

POLICIES = Registry(
    "memory.policy",
    {
        "none": "fastcraft.memory.policies.none:KeepAll",
        "step": "fastcraft.memory.policies.step:RecomputeSteps",
    },
)
