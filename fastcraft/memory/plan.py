"""What a step with gradient keeps for backward, as data: treatments of one call, and the plan of a whole run.

`fastcraft.memory.policies` make plans; `fastcraft.diffusion.treatments` carries them out.
"""

from dataclasses import dataclass

import torch

KEEP = "keep"
"""Keep every activation of the step."""
RECOMPUTE = "recompute"
"""Keep only the step's inputs; run the step again during backward."""
RECOMPUTE_BLOCKS = "recompute+block"
"""As `RECOMPUTE`, and each block of the network is recomputed once more inside: the smallest transient."""
SAC = "sac:"
"""With op kinds, "sac:attention+conv": keep what these ops return, run the rest of the step again."""
OFFLOAD = "offload:"
"""As `SAC`, with what is kept moved to pinned host memory in the meantime; CUDA only."""
OP_KINDS = ("attention", "conv", "linear", "norm", "fastcraft")
"""What may stand behind `SAC` and `OFFLOAD`; "fastcraft" is every fused op, which may also be named one by one."""


def treatment_ops(treatment: str) -> tuple[str, ...]:
    """The op kinds of a selective treatment; empty for one that names none."""
    return tuple(treatment.partition(":")[2].split("+")) if treatment.startswith((SAC, OFFLOAD)) else ()


def check_treatment(treatment: str) -> None:
    """Raise `ValueError` unless ``treatment`` is one of the above and every op kind in it is known."""
    if treatment in (KEEP, RECOMPUTE, RECOMPUTE_BLOCKS):
        return
    ops = treatment_ops(treatment)
    if not ops:
        raise ValueError(
            f"a treatment is {KEEP!r}, {RECOMPUTE!r}, {RECOMPUTE_BLOCKS!r}, '{SAC}OPS' or '{OFFLOAD}OPS', "
            f"got {treatment!r}"
        )
    for op in ops:
        if op not in OP_KINDS and not (op.isidentifier() and hasattr(torch.ops.fastcraft, op)):
            raise ValueError(
                f"{treatment!r}: an op is one of {', '.join(OP_KINDS)} or a fused op's own name, joined by '+'; "
                f"got {op!r}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointPlan:
    """What is kept and what is recomputed, per step with gradient (in order) and for the decode.

    ``segments``: lengths of runs of steps that are recomputed together, in order and covering all of them; empty = each
    step stands alone. ``batched``: steps that backward recomputes in one call of the UNet, for a `Trajectory` without
    ``input_grad``, whose steps do not wait for each other; 0 = one after the other. ``decode_micro_batch`` below the
    batch size also makes the head (decode and rewards) go backward part by part before the steps do.
    """

    steps: tuple[str, ...]
    decode: str = RECOMPUTE
    decode_micro_batch: int = 0  # images decoded at once; 0 = the whole batch
    segments: tuple[int, ...] = ()
    batched: int = 0

    def __post_init__(self) -> None:
        for treatment in {*self.steps, self.decode}:
            check_treatment(treatment)
        if self.batched < 0 or (self.batched and (self.segments or {*self.steps} - {RECOMPUTE})):
            raise ValueError(
                f"CheckpointPlan: batched must be 0, or at least 1 with every step {RECOMPUTE!r} and no segments, got "
                f"{self.batched} with {sorted(set(self.steps))}, segments {self.segments}"
            )
        if not self.segments:
            return
        if min(self.segments) < 1 or sum(self.segments) != len(self.steps):
            raise ValueError(
                f"CheckpointPlan: segments must be at least 1 and add up to {len(self.steps)} steps, "
                f"got {self.segments}"
            )
        if any(treatment_ops(treatment) for treatment in self.steps):
            raise ValueError(
                "CheckpointPlan: a segment is run again as a whole, so what a step inside it keeps would be dropped; "
                f"got segments {self.segments} with {sorted(set(self.steps))}"
            )
