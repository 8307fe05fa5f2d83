"""No checkpointing: fastest, memory grows with the depth."""

from fastcraft.memory.plan import KEEP, CheckpointPlan


class KeepAll:
    """Keeps every activation of every step and of the decode."""

    def plan(self, backprop_steps: int, *, decode_micro_batch: int = 0) -> CheckpointPlan:
        """The plan for ``backprop_steps`` steps with gradient."""
        return CheckpointPlan(steps=(KEEP,) * backprop_steps, decode=KEEP, decode_micro_batch=decode_micro_batch)
