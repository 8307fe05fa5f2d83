"""A plan written out in the recipe."""

import re
from typing import ClassVar

from fastcraft.errors import UserError
from fastcraft.memory.plan import KEEP, RECOMPUTE, CheckpointPlan, check_treatment


class ExplicitPlan:
    """One treatment per step, in the order of the steps: ``plan:3*recompute,sac:attention+conv,2*keep``.

    Steps that keep more belong at the end (see `KeepLast`). When a truncation draws more steps than the plan names, the
    first treatment is repeated; when it draws fewer, the last ones hold.

    Args:
        steps: treatments of `fastcraft.records`, separated by commas, each with ``N*`` before it for N steps.

    Raises:
        UserError: not a list of treatments.
    """

    example: ClassVar[str] = "plan:3*recompute,2*keep"

    def __init__(self, steps: str) -> None:
        treatments: list[str] = []
        for item in steps.split(","):
            match = re.fullmatch(r"(?:([1-9]\d*)\*)?(\S+)", item.strip())
            try:
                check_treatment(match[2] if match else item)
            except ValueError as error:
                raise UserError(f"plan: {error}") from error
            assert match is not None
            treatments += [match[2]] * int(match[1] or 1)
        self.treatments = tuple(treatments)
        self.num_steps = len(treatments)

    def plan(self, backprop_steps: int, *, decode_micro_batch: int = 0) -> CheckpointPlan:
        """The plan for ``backprop_steps`` steps with gradient."""
        missing = max(0, backprop_steps - self.num_steps)
        return CheckpointPlan(
            steps=(self.treatments[:1] * missing + self.treatments)[-backprop_steps:],
            decode=KEEP if decode_micro_batch else RECOMPUTE,
            decode_micro_batch=decode_micro_batch,
        )
