"""Exponential moving averages of the float32 masters, on the shard of them that a rank has.

The decay grows with the number of updates n as in diffusers' ``EMAModel``: min(decay, (1 + n) / (10 + n)), so the first
values are soon forgotten. An average lies in the optimiser's state beside the moments, in the masters' flat layout.
"""

from collections.abc import Iterable
from typing import Any

import torch

NAME = "ema"
"""What the optimiser's state calls an average."""


def add_averages(optimizer: Any, decays: Iterable[float]) -> None:
    """Begin an average in every parameter group with a decay above 0, at the masters' present values."""
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        if decay:
            for master in group["params"]:
                optimizer.state[master][NAME] = master.detach().clone()


@torch.no_grad()
def update_averages(optimizer: Any, decays: Iterable[float], *, num_updates: int) -> None:
    """Take the masters in after an update, the ``num_updates``-th one."""
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        if decay:
            weight = min(decay, (1 + num_updates) / (10 + num_updates))
            for master in group["params"]:
                optimizer.state[master][NAME].lerp_(master, 1 - weight)
