"""Checkpointing of every step and of the blocks inside it: the smallest memory, two extra forwards."""

from fastcraft.memory.plan import RECOMPUTE_BLOCKS, CheckpointPlan


class RecomputeBlocks:
    """Keeps each step's inputs; during backward the step runs again keeping the inputs of its blocks, which run again.

    For batches or resolutions at which one whole step does not fit. The decode is treated alike.
    """

    def plan(self, backprop_steps: int, *, decode_micro_batch: int = 0) -> CheckpointPlan:
        """The plan for ``backprop_steps`` steps with gradient."""
        return CheckpointPlan(
            steps=(RECOMPUTE_BLOCKS,) * backprop_steps, decode=RECOMPUTE_BLOCKS, decode_micro_batch=decode_micro_batch
        )
