"""Rewards that a run is not trained on: what they say when the trained ones are no longer to be believed."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from fastcraft.evaluation.scores import REWARD, Rewards, score_pictures

HELD_OUT = "held_out/"
FALLING = "held_out_falling"
"""How many held-out rewards fall while the trained total rises, in the evaluation that says so."""
GRID = "grid/"
"""Before the names of an evaluation during training, which sees the same pictures' prompts and seeds every time."""


def held_out_means(images: Tensor, prompts: Sequence[str], *, rewards: Rewards, micro_batch: int) -> dict[str, float]:
    """Mean of each held-out reward, ``held_out/<name>``; arguments as in `score_pictures`."""
    scores = score_pictures(images, prompts, rewards=rewards, micro_batch=micro_batch)
    return {HELD_OUT + name: values.double().mean().item() for name, values in scores.items() if name != "total"}


def falling(evaluations: Sequence[Mapping[str, Any]], *, patience: int) -> list[str]:
    """The held-out rewards that fell while the trained total rose, in each of the last ``patience`` evaluations.

    Args:
        evaluations: by step, what `read_evaluations` gives under ``evaluation``; those before and after the run are of
            other pictures and do not count. A figure that is missing or null neither rises nor falls.
        patience: comparisons of one evaluation with the one before it; at least 1.
    """
    series = [evaluation for evaluation in evaluations if f"{GRID}{REWARD}total" in evaluation]
    recent = series[-patience - 1 :]
    if len(recent) <= patience:
        return []

    def moves(name: str, sign: int) -> bool:
        values = [evaluation.get(GRID + name) for evaluation in recent]
        return all(
            before is not None and after is not None and sign * (after - before) > 0
            for before, after in pairwise(values)
        )

    names = [name.removeprefix(GRID) for name in recent[-1] if name.startswith(GRID + HELD_OUT)]
    if not moves(f"{REWARD}total", 1):
        return []
    return [name.removeprefix(HELD_OUT) for name in names if moves(name, -1)]
