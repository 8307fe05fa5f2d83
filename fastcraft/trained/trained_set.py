"""The parts of a model that one engine trains together: each whole, by adapters, or not at all.

What a part was before training stays at hand as its original: a part with adapters is its own original while they are
switched off, a part that is trained whole has a frozen copy where one is needed.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fastcraft.trained.lora import adapters_off

Mode = Literal["full", "lora", "frozen"]


@dataclass(frozen=True, kw_only=True)
class TrainedPart:
    """One part, and how it is trained.

    ``name``: ``"text"``, ``"text_2"`` or ``"unet"``, the prefix of its weights' names. ``module``: whose forward it is.
    ``mode``: ``"full"`` trains every weight, ``"lora"`` the adapters that are in the module already, ``"frozen"`` none.
    ``original``: a frozen copy from before training; a part with adapters needs none. ``ema_decay``: of the float32
    average of its weights that is kept beside them; 0 = none.
    """

    name: str
    module: nn.Module
    mode: Mode
    learning_rate: float = 0.0
    original: nn.Module | None = None
    ema_decay: float = 0.0

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names within the part, and the parameters that are trained."""
        return ((name, param) for name, param in self.module.named_parameters() if param.requires_grad)


class TrainedSet(nn.Module):
    """What the engine wraps. A parameter's name is its part's name and, behind a dot, its name within the part.

    Args:
        parts: with names of their own.
        dtype: of the arithmetic where weights are float32.
    """

    def __init__(self, parts: Sequence[TrainedPart], *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.parts: Mapping[str, TrainedPart] = {part.name: part for part in parts}
        for part in parts:
            self.add_module(part.name, part.module)

    def forward(self, part: str, *args: Any, **kwargs: Any) -> Any:
        """The part's forward, under autocast."""
        with self._autocast():
            return self.parts[part].module(*args, **kwargs)

    def _autocast(self) -> torch.autocast:
        device = next(self.parameters()).device.type
        return torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32)

    def original(self, name: str) -> Callable[..., Any]:
        """The part's forward before training; without gradient.

        Raises:
            ValueError: a part that is trained whole and of which no copy was kept.
        """
        part = self.parts[name]
        if part.original is not None:
            return torch.no_grad()(part.original.__call__)
        if part.mode == "full":
            raise ValueError(f"TrainedSet: no original of {name!r} was kept")

        @torch.no_grad()
        def without_adapters(*args: Any, **kwargs: Any) -> Any:
            with adapters_off(part.module), self._autocast():
                return part.module(*args, **kwargs)

        return without_adapters

    def trained_parts(self) -> list[TrainedPart]:
        """The parts that have something to train, in order."""
        return [part for part in self.parts.values() if part.mode != "frozen"]


def frozen_copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy for `TrainedPart.original`."""
    return copy.deepcopy(module).to(dtype).requires_grad_(False).eval()
