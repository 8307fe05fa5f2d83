"""What an engine is told of its parameters, and what it tells of an update."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterGroup:
    """Parameters with a learning rate of their own, by their names in the module.

    ``learning_rate`` is the peak; ``ema_decay`` that of an average kept beside the weights, 0 = none.
    """

    name: str
    parameters: Mapping[str, nn.Parameter]
    learning_rate: float
    ema_decay: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one call of `Zero2Engine.step` did.

    ``took_step``: the weights were updated. ``skipped``: an update was due and dropped, the gradient not being finite.
    Both are False while gradients accumulate. ``grad_norm``: global norm before clipping when the weights were
    updated. ``lr``: the learning rates of this update, or of the one that is due next, by parameter group.
    """

    took_step: bool
    skipped: bool
    grad_norm: float | None
    lr: Mapping[str, float]


def one_group(module: nn.Module, *, learning_rate: float) -> list[ParameterGroup]:
    """All trained parameters of a module as one group."""
    parameters = {name: param for name, param in module.named_parameters() if param.requires_grad}
    return [ParameterGroup(name="all", parameters=parameters, learning_rate=learning_rate)]
