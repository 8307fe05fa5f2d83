"""Learning rates: one pure function of the update's number, so there is no scheduler state to save."""

import math


def lr_at(step: int, *, peak: float, warmup_steps: int, total_steps: int, schedule: str) -> float:
    """Learning rate of update number ``step``, counted from 0.

    The warm-up is linear and begins at ``peak / warmup_steps``, so no update has a rate of zero; ``"cosine"`` then
    falls along half a cosine that would reach zero at ``total_steps``, ``"constant"`` stays at ``peak``.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    if schedule != "cosine":
        raise ValueError(f"schedule must be 'constant' or 'cosine', got {schedule!r}")
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
