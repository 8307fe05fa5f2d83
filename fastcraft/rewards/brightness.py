"""Mean luma: the smallest honest reward, used by tests and as a template."""

from collections.abc import Sequence

from torch import Tensor

from fastcraft.rewards.base import Reward


class BrightnessReward(Reward):
    """Mean ITU-R BT.601 luma of an image.

    Official preprocessing: none; every pixel counts as it is, and nothing is resized, cut or clamped.
    """

    name = "brightness"
    uses_prompt = False
    score_range = "[0, 1]; higher is brighter"

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """``(B, 3, H, W)`` in ``[0, 1]`` to ``(B,)`` float32; ``prompts`` are ignored."""
        red, green, blue = images.float().mean(dim=(2, 3)).unbind(dim=1)  # 3 x (B,)
        return 0.299 * red + 0.587 * green + 0.114 * blue
