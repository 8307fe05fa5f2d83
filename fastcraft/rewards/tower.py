"""What every frozen image judge shares: preprocessing done once per batch and size, and features done once per batch.

Shape letters: B images, H and W pixels.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Self

import torch
from torch import Tensor, nn

from fastcraft.rewards.preprocess import Fit, Resize, placement, resize_normalize


class ImageCache:
    """Results for one batch of images, kept inside a ``with`` block and nowhere else."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Hashable, bool], tuple[Tensor, Tensor]] = {}
        self._depth = 0

    @contextmanager
    def block(self) -> Iterator[None]:
        """Inside, `get` remembers; blocks may be nested, and the outermost forgets everything at its end."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._kept.clear()

    def get(self, images: Tensor, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """``compute()``, or what it gave for this very tensor and ``key`` earlier in the block."""
        if not self._depth:
            return compute()
        # A result with gradient serves a call without, never the other way round.
        for with_grad in {torch.is_grad_enabled(), True}:
            known, value = self._kept.get((key, with_grad), (None, None))
            if known is images and value is not None:
                return value
        value = compute()
        self._kept[key, torch.is_grad_enabled()] = (images, value)
        return value


class Tower(nn.Module):
    """A frozen network that reads images.

    Args:
        source: where it came from, for records and messages.
        pixels: preprocessed images, shared by the towers that were given the same cache; None = its own.
    """

    def __init__(self, *, source: str, pixels: ImageCache | None = None) -> None:
        super().__init__()
        self.source = source
        self.pixels = pixels or ImageCache()
        self.features = ImageCache()

    @property
    def image_network(self) -> nn.Module | None:
        """The part that reads pictures, where the fused ops may be put in; None = nowhere."""
        return None

    def freeze(self) -> Self:
        """No parameter takes gradient and no dropout is on, from now on."""
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode whatever is asked."""
        return super().train(False)

    @contextmanager
    def shared_images(self) -> Iterator[None]:
        """Inside, the same ``images`` tensor is preprocessed and encoded once; nothing is kept afterwards."""
        with ExitStack() as stack:
            stack.enter_context(self.pixels.block())
            stack.enter_context(self.features.block())
            yield

    def preprocessed(self, images: Tensor, size: int, *, resize: Resize, clamp: bool, fit: Fit = "crop") -> Tensor:
        """`resize_normalize` with the constants of CLIP, which BLIP uses too: ``(B, 3, size, size)``."""
        return self.pixels.get(
            images,
            (size, placement(images, size, fit), resize, clamp),
            lambda: resize_normalize(images, size, resize=resize, fit=fit, straight_through_clamp=clamp),
        )


def raised(tensor: Tensor) -> Tensor:
    """At least float32: scores are never computed in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
