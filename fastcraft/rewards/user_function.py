"""A user's own function as a reward."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcraft.errors import UserError
from fastcraft.registry import resolve
from fastcraft.rewards.base import Reward
from fastcraft.rewards.checks import checked_flag

Function = Callable[[Tensor, Sequence[str]], Any]


class CallableReward(Reward):
    """``function(images, prompts)``, for what does not deserve a class.

    Official preprocessing: none; the function gets whole pictures, and texts as they are.

    Args:
        function: ``"package.module:name"`` or the function itself. It gets ``(B, 3, H, W)`` images in ``[0, 1]`` and B
            prompts, and returns B numbers: a tensor, an array or a list. It must not mix images of the batch.
        differentiable: it is made of torch operations, and gradient goes through it. Without, it gets images that are
            cut off from the graph.

    Raises:
        UserError: there is no such function.
    """

    name = "callable"
    uses_prompt = True
    score_range = "whatever the function returns"

    def __init__(self, *, function: str | Function, differentiable: bool = False) -> None:
        super().__init__()
        self.function: Function = (
            resolve(function, "rewards: option function of 'callable'") if isinstance(function, str) else function
        )
        if not callable(self.function):
            raise UserError(f"rewards: option function of 'callable' must be a function, got {function!r}")
        self.source = function if isinstance(function, str) else getattr(function, "__qualname__", repr(function))
        self.differentiable = checked_flag("callable", "differentiable", differentiable)
        self.freeze()

    @property
    def settings(self) -> Mapping[str, Any]:
        """The function's name, and whether gradient goes through it."""
        return {"function": self.source, "differentiable": self.differentiable}

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """``(B, 3, H, W)`` in ``[0, 1]`` and B prompts to ``(B,)`` float32.

        Raises:
            UserError: the function does not return one number for each image, or no gradient although it was to.
        """
        if self.differentiable:
            scores = self.function(images, prompts)
        else:
            with torch.no_grad():
                scores = self.function(images.detach(), prompts)
        try:
            scores = torch.as_tensor(scores, device=images.device).to(torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"rewards: {self.source!r} must return numbers, got {type(scores).__name__}") from error
        if scores.shape != (images.shape[0],):
            raise UserError(
                f"rewards: {self.source!r} must return {images.shape[0]} numbers, one for each image, "
                f"got shape {tuple(scores.shape)}"
            )
        if self.differentiable and torch.is_grad_enabled() and images.requires_grad and not scores.requires_grad:
            raise UserError(f"rewards: {self.source!r} is declared differentiable, but no gradient comes through it")
        return scores
