"""LAION's aesthetic predictor: an affine score of a CLIP image embedding."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from fastcraft.errors import UserError
from fastcraft.rewards.affine_head import AffineHead, collapse
from fastcraft.rewards.clip_files import OPENAI_CLIP_L, released_clip
from fastcraft.rewards.clip_tower import ClipTower, Towers
from fastcraft.rewards.tensor_files import ReleasedFile, find_file, read_tensors
from fastcraft.rewards.tower_reward import TowerReward

HEAD_FILE = "aesthetic.safetensors"
"""What a folder given as path holds, unless it holds the released file."""
RELEASED_HEAD = ReleasedFile(
    name="sac+logos+ava1-l14-linearMSE.pth",
    url="https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
    "sac%2Blogos%2Bava1-l14-linearMSE.pth",
    sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    num_bytes=3_714_759,
)


class AestheticReward(TowerReward):
    """Predicted mean rating of a picture, nominally 1 to 10; Stable Diffusion 1.5 scores 5.2 to 5.5.

    Official preprocessing, of OpenAI's CLIP: the short side of the 8-bit picture becomes 224 by bicubic, then the
    centre is cut out (`placement` ``crop``).

    Args:
        tower: the CLIP model the head was trained on (OpenAI ViT-L/14 for the released head).
        head: see `load_head`; kept in float32 whatever the tower's dtype.
        options: see `TowerReward`.

    Source: LAION improved aesthetic predictor, ``sac+logos+ava1-l14-linearMSE``.
    """

    name = "aesthetic"
    uses_prompt = False
    score_range = "nominally 1 to 10, unbounded; 5 to 7 in practice"
    files = (RELEASED_HEAD, *released_clip(OPENAI_CLIP_L))

    vector: Tensor
    bias: Tensor

    def __init__(self, tower: ClipTower, head: AffineHead, **options: Any) -> None:
        super().__init__(tower, **options)
        if head.vector.numel() != tower.width:
            raise UserError(
                f"rewards: aesthetic head {head.source!r} reads {head.vector.numel()} features, "
                f"but clip_path {tower.source!r} gives {tower.width}"
            )
        self.source = head.source
        self.register_buffer("vector", head.vector)
        self.register_buffer("bias", head.bias)
        self.freeze()

    @classmethod
    def build(cls, path: str, *, towers: Towers, clip_path: str = "", **options: Any) -> Self:
        """``path`` is the head: a file, a folder with ``aesthetic.safetensors`` or the released file, or a hub id.

        Empty = the released one, downloaded once and checked against its SHA-256.
        ``clip_path`` is the CLIP model; empty = openai/clip-vit-large-patch14, or the bundled one for ``"shapes"``.
        """
        head = load_head(towers.resolve(path) if path else "")
        default = "shapes" if path == "shapes" else OPENAI_CLIP_L
        return cls(towers.clip(clip_path or default), head, **options)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Backbone, resize, clamp and head."""
        return {**super().settings, "head": self.source}

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """``(B, 3, H, W)`` in ``[0, 1]`` to ``(B,)`` float32; ``prompts`` are ignored."""
        features = self.image_features(images)  # (B, D)
        return (features * self.vector.to(features)).sum(dim=-1) + self.bias.to(features)


def load_head(path: str) -> AffineHead:
    """Read ``layers.{0,2,4,6,7}.{weight,bias}`` of any widths and multiply them out.

    Args:
        path: see `AestheticReward.build`.

    Raises:
        UserError: no such file, another ending, not a plain file of tensors, wrong names or shapes.
    """
    bundled = Path(path) / HEAD_FILE
    file = bundled if path and bundled.is_file() else find_file(path, RELEASED_HEAD, reward="aesthetic")
    return collapse(read_tensors(file, reward="aesthetic"), source=path or str(file))
