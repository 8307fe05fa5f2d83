"""The contract that every reward meets.

Shape letters: B images, H and W pixels.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from fastcraft.errors import UserError
from fastcraft.rewards.clip_tower import Towers
from fastcraft.rewards.tensor_files import ReleasedFile


class Reward(nn.Module, ABC):
    """A frozen judge of images.

    A subclass sets the class attributes, loads its weights, calls `freeze` last in ``__init__`` and implements
    ``forward``. It never mixes images of a batch: the gradient of score i with respect to image j is zero. Its
    docstring states the official preprocessing of pictures and texts, and it does the same. Adding one to the project
    takes its file and one line in ``fastcraft.rewards.REWARDS``.
    """

    name: ClassVar[str]
    """Key of its scores in metrics."""
    uses_prompt: ClassVar[bool]
    """Whether the score depends on the prompt."""
    differentiable: bool = True
    """Whether gradient reaches the images."""
    loads_weights: ClassVar[bool] = False
    """Whether ``path`` means something to it."""
    score_range: ClassVar[str]
    """Typical and possible values, for people."""
    files: ClassVar[tuple[ReleasedFile, ...]] = ()
    """All published files that it reads when ``path`` is empty, vocabularies and configurations too; weights first."""

    def __init__(self) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score every image.

        Args:
            images: ``(B, 3, H, W)`` float32 or bfloat16, sRGB in ``[0, 1]``.
            prompts: ``B`` strings, one per image.

        Returns:
            ``(B,)`` float32; higher is better. A judge that was put into float64 answers in float64.
        """

    @classmethod
    def build(cls, path: str, *, towers: Towers, **options: Any) -> Self:
        """Make the reward from a recipe's entry. A reward with weights overrides this and names its options.

        Args:
            path: file, folder or hub id of the weights; empty = the reward's default.
            towers: shared CLIP models, and the device, the dtype and the bundled folder.
            options: further keyword arguments of the recipe's entry.

        Raises:
            UserError: a path for a reward without weights.
        """
        if path:
            raise UserError(f"rewards: {cls.name!r} loads no weights, so path must be empty, got {path!r}")
        return cls(**options)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What a score must be quoted with to be comparable, as plain values; empty when there is nothing."""
        return {}

    @property
    def counts(self) -> Mapping[str, int]:
        """What happened while scoring, by description; empty when there is nothing to tell."""
        return {}

    def freeze(self) -> Self:
        """No parameter takes gradient and no dropout is on, from now on."""
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode whatever is asked: a judge with dropout is another judge every time."""
        return super().train(False)
