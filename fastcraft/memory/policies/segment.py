"""Checkpointing of several steps at once."""

from typing import ClassVar

from fastcraft.memory.plan import KEEP, RECOMPUTE, CheckpointPlan
from fastcraft.memory.policies import count


class RecomputeSegments:
    """Keeps the inputs of every ``k``-th step and recomputes ``k`` steps together.

    Chen et al. 2016, arXiv:1604.06174, section 4. Here the state between steps is one latent per sample, so this keeps
    little less than ``step`` and holds the activations of ``k`` steps at once; it pays for samplers with larger states.

    Args:
        k: steps of a segment; the first segment is shorter when ``k`` does not divide the depth.
    """

    example: ClassVar[str] = "segment:2"

    def __init__(self, k: str) -> None:
        self.k = count("segment", k)

    def plan(self, backprop_steps: int, *, decode_micro_batch: int = 0) -> CheckpointPlan:
        """The plan for ``backprop_steps`` steps with gradient."""
        full, rest = divmod(backprop_steps, self.k)
        return CheckpointPlan(
            steps=(KEEP,) * backprop_steps,
            decode=KEEP if decode_micro_batch else RECOMPUTE,
            decode_micro_batch=decode_micro_batch,
            segments=((rest,) if rest else ()) + (self.k,) * full,
        )
