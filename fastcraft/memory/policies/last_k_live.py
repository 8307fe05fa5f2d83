"""The last steps keep everything, the earlier ones are recomputed."""

from typing import ClassVar

from fastcraft.memory.plan import KEEP, RECOMPUTE, CheckpointPlan
from fastcraft.memory.policies import count


class KeepLast:
    """Keeps every activation of the last ``k`` steps and recomputes the steps before them.

    The steps that keep go last because backward frees them first: before an earlier step is run again, they are gone.

    Args:
        k: steps that are kept; with ``k`` at least the depth this is ``none`` with a recomputed decode.
    """

    example: ClassVar[str] = "last_k_live:2"

    def __init__(self, k: str) -> None:
        self.k = count("last_k_live", k)

    def plan(self, backprop_steps: int, *, decode_micro_batch: int = 0) -> CheckpointPlan:
        """The plan for ``backprop_steps`` steps with gradient."""
        live = min(self.k, backprop_steps)
        return CheckpointPlan(
            steps=(RECOMPUTE,) * (backprop_steps - live) + (KEEP,) * live,
            decode=KEEP if decode_micro_batch else RECOMPUTE,
            decode_micro_batch=decode_micro_batch,
        )
