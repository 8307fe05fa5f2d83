"""Checkpointing of every step: one latent kept per step, memory flat in the depth, one extra forward."""

from fastcraft.memory.plan import KEEP, RECOMPUTE, CheckpointPlan


class RecomputeSteps:
    """Keeps only each step's inputs (one latent per sample) and recomputes the step and the decode in backward.

    TextCraftor and AlignProp do this. Since the state between steps is one latent, schemes with fewer checkpoints
    (Chen et al. 2016, arXiv:1604.06174) save nothing here. A decode in micro-batches is small and is kept.
    """

    def plan(self, backprop_steps: int, *, decode_micro_batch: int = 0) -> CheckpointPlan:
        """The plan for ``backprop_steps`` steps with gradient."""
        return CheckpointPlan(
            steps=(RECOMPUTE,) * backprop_steps,
            decode=KEEP if decode_micro_batch else RECOMPUTE,
            decode_micro_batch=decode_micro_batch,
        )
