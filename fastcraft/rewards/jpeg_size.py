"""Size of the picture as a JPEG file: the plainest reward without a gradient."""

import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastcraft.errors import UserError
from fastcraft.rewards.base import Reward
from fastcraft.rewards.preprocess import to_bytes

QUALITY = 95


class JpegSizeReward(Reward):
    """Kilobytes (1000 bytes) of the picture as JPEG of quality 95: negative to make pictures compressible.

    Official preprocessing: none but the rounding to 8 bits; nothing is resized, so scores of two sizes do not compare.

    Args:
        prefer: ``"small"``: minus the size, compressibility; ``"large"``: the size, incompressibility.

    Source: DDPO, arXiv:2305.13301, section 5.
    """

    name = "jpeg_size"
    uses_prompt = False
    differentiable = False
    score_range = "kB: above 0 (prefer large) or below 0 (prefer small); 512 px gives about 50 to 200"

    def __init__(self, *, prefer: Literal["small", "large"] = "small") -> None:
        super().__init__()
        if prefer not in ("small", "large"):
            raise UserError(f"rewards: option prefer of 'jpeg_size' must be 'small' or 'large', got {prefer!r}")
        self.prefer = prefer
        self.freeze()

    @property
    def settings(self) -> Mapping[str, Any]:
        """What is preferred, and the quality."""
        return {"prefer": self.prefer, "quality": QUALITY}

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """``(B, 3, H, W)`` in ``[0, 1]`` to ``(B,)`` float32; ``prompts`` are ignored. Runs on the CPU."""
        from PIL import Image

        sizes = []
        for picture in to_bytes(images):
            file = io.BytesIO()
            Image.fromarray(picture).save(file, format="JPEG", quality=QUALITY)
            sizes.append(file.tell() / 1000)
        sign = 1.0 if self.prefer == "large" else -1.0
        return torch.tensor([sign * size for size in sizes], dtype=torch.float32, device=images.device)
