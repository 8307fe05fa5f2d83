"""Selective checkpointing by kind of op: keep what is dear to compute, recompute what is cheap."""

from typing import ClassVar

from fastcraft.errors import UserError
from fastcraft.memory.plan import KEEP, OFFLOAD, RECOMPUTE, SAC, CheckpointPlan, check_treatment


class SaveOps:
    """Keeps, of every step, the outputs of the named ops, and recomputes everything else.

    For Stable Diffusion's UNet ``attention+conv`` keeps about a fifth of the bytes and recomputes under a third of the
    arithmetic. The decode is recomputed as a whole: it goes backward first, when nothing of the steps is free yet.

    Args:
        ops: kinds of `fastcraft.memory.plan.OP_KINDS` or names of fused ops, joined by ``+``.

    Raises:
        UserError: an unknown op.
    """

    example: ClassVar[str] = "sac:attention+conv"
    treatment: ClassVar[str] = SAC

    def __init__(self, ops: str) -> None:
        self.step = self.treatment + ops
        try:
            check_treatment(self.step)
        except ValueError as error:
            raise UserError(str(error)) from error

    def plan(self, backprop_steps: int, *, decode_micro_batch: int = 0) -> CheckpointPlan:
        """The plan for ``backprop_steps`` steps with gradient."""
        return CheckpointPlan(
            steps=(self.step,) * backprop_steps,
            decode=KEEP if decode_micro_batch else RECOMPUTE,
            decode_micro_batch=decode_micro_batch,
        )


class OffloadOps(SaveOps):
    """As `SaveOps`, with the kept outputs in pinned host memory until backward comes to their step.

    The copies run on a stream of their own, those back from the moment that their step is run again: device memory
    stays flat in the depth, and a step waits as long as its copies take longer than what it recomputes.
    """

    example: ClassVar[str] = "offload:attention"
    treatment: ClassVar[str] = OFFLOAD
