"""The training loop that all four networks share: cosine schedule, moving average, log, and resumption."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

LossAt = Callable[[torch.Generator], Tensor]
"""Draws one batch with the generator and returns its loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FitPlan:
    """How one network is trained."""

    name: str
    steps: int
    learning_rate: float
    seed: int
    horizon: int | None = None
    """Steps after which the cosine reaches its end; None: `steps`. A longer horizon ends at a higher rate."""
    warmup: int = 100
    weight_decay: float = 0.01
    ema_decay: float | None = None
    """Decay of the moving average of the weights that is kept in the end; None keeps the last weights."""
    autocast: bool = False
    """Compute losses in bfloat16 where torch thinks it safe."""
    checkpoint_every: int = 250


def _learning_rate(plan: FitPlan, step: int) -> float:
    warm = min(1.0, (step + 1) / max(1, min(plan.warmup, plan.steps // 4)))
    return (
        plan.learning_rate
        * warm
        * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * step / (plan.horizon or plan.steps))))
    )


def _average(target: nn.Module, source: nn.Module, decay: float) -> None:
    with torch.no_grad():
        for kept, new in zip(target.parameters(), source.parameters(), strict=True):
            kept.lerp_(new, 1.0 - decay)


def fit(module: nn.Module, loss_at: LossAt, plan: FitPlan, folder: Path) -> list[float]:
    """Train `module` in place and leave it in evaluation mode, without gradients.

    Each step's batch depends on the seed and the step alone, so a resumed run continues as if never stopped.

    Args:
        module: everything that learns.
        loss_at: one training step's loss.
        plan: lengths and rates.
        folder: where `<name>.ckpt` is kept; a checkpoint found there is continued, or just read if complete.

    Returns:
        The loss of every step.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay)
    average = copy.deepcopy(module) if plan.ema_decay else None
    path, losses, begin = folder / f"{plan.name}.ckpt", [], 0
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        state = torch.load(path, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        if average is not None:
            average.load_state_dict(state["average"])
        losses, begin = state["losses"], len(state["losses"])
    module.train()
    device = next(module.parameters()).device.type
    started = time.perf_counter()
    for step in range(begin, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(plan, step)
        with torch.autocast(device, torch.bfloat16, enabled=plan.autocast):
            loss = loss_at(torch.Generator().manual_seed(plan.seed * 1_000_003 + step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        if average is not None and plan.ema_decay is not None:
            _average(average, module, min(plan.ema_decay, (1.0 + step) / (10.0 + step)))
        losses.append(float(loss.detach()))
        if (step + 1) % 50 == 0 or step + 1 == plan.steps:
            recent = losses[-50:]
            pace = (time.perf_counter() - started) / (step + 1 - begin)
            text = f"{plan.name} {step + 1}/{plan.steps} loss {sum(recent) / len(recent):.4f} {pace:.3f} s/step"
            print(text, flush=True)
        if (step + 1) % plan.checkpoint_every == 0 or step + 1 == plan.steps:
            state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
            torch.save({**state, "average": average.state_dict() if average is not None else {}}, path)
    if average is not None:
        module.load_state_dict(average.state_dict())
    module.eval().requires_grad_(False)
    return losses
