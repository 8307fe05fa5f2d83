"""Checkpointing of steps that do not wait for each other, several recomputed in one call."""

from typing import ClassVar

from fastcraft.memory.plan import KEEP, RECOMPUTE, CheckpointPlan
from fastcraft.memory.policies import count


class BatchSteps:
    """As ``step``, with ``n`` steps run again and taken backward in one call of the UNet, at ``n`` times the batch.

    For a stop-gradient on the UNet's input (``input_grad = False``; DRTune, arXiv:2405.00760, Sec. 3): the
    steps are then independent in backward. Memory is that of ``n`` steps whatever the depth; ``batched:1`` is ``step``.
    The gradient is that of the other policies up to rounding: a larger batch adds up in another order.

    Args:
        n: steps of a call; the first call has fewer when ``n`` does not divide the depth.
    """

    example: ClassVar[str] = "batched:2"

    def __init__(self, n: str) -> None:
        self.n = count("batched", n)

    def plan(self, backprop_steps: int, *, decode_micro_batch: int = 0) -> CheckpointPlan:
        """The plan for ``backprop_steps`` steps with gradient."""
        return CheckpointPlan(
            steps=(RECOMPUTE,) * backprop_steps,
            decode=KEEP if decode_micro_batch else RECOMPUTE,
            decode_micro_batch=decode_micro_batch,
            batched=min(self.n, backprop_steps),
        )
