"""LAION's aesthetic predictor: an affine score of a CLIP image embedding."""

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from fastcraft.errors import UserError
from fastcraft.rewards.base import Reward
from fastcraft.rewards.checks import checked_resize
from fastcraft.rewards.clip_files import some
from fastcraft.rewards.clip_tower import OPENAI_CLIP_L, ClipTower, Towers
from fastcraft.rewards.preprocess import Resize

LAYERS = (0, 2, 4, 6, 7)
"""Positions of the linear layers in the released head; dropout sits between them, and no non-linearity."""
HEAD_FILE = "aesthetic.safetensors"
"""What a folder given as path holds."""

RELEASED_HEAD = "sac+logos+ava1-l14-linearMSE.pth"
RELEASED_URL = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth"
)
RELEASED_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"


@dataclass(frozen=True, kw_only=True, slots=True)
class AestheticHead:
    """``score = vector . features + bias``: ``vector`` is ``(D,)`` float32, ``bias`` ``()`` float32."""

    vector: Tensor
    bias: Tensor
    source: str
    """Where it came from, for records and messages."""


class AestheticReward(Reward):
    """Predicted mean rating of a picture, nominally 1 to 10; Stable Diffusion 1.5 scores 5.2 to 5.5.

    Args:
        tower: the CLIP model the head was trained on (OpenAI ViT-L/14 for the released head).
        head: see `load_head`.
        resize: see `resize_normalize`.

    Source: LAION improved aesthetic predictor, ``sac+logos+ava1-l14-linearMSE``.
    """

    name = "aesthetic"
    uses_prompt = False
    loads_weights = True
    score_range = "nominally 1 to 10, unbounded by construction; 5 to 7 in practice"

    vector: Tensor
    bias: Tensor

    def __init__(self, tower: ClipTower, head: AestheticHead, *, resize: Resize = "bicubic") -> None:
        super().__init__()
        if head.vector.numel() != tower.width:
            raise UserError(
                f"rewards: aesthetic head {head.source!r} reads {head.vector.numel()} features, "
                f"but clip_path {tower.source!r} gives {tower.width}"
            )
        self.tower = tower
        self.source = head.source
        self.resize: Resize = checked_resize("aesthetic", resize)
        self.register_buffer("vector", head.vector)
        self.register_buffer("bias", head.bias)
        self.freeze()

    @classmethod
    def build(cls, path: str, *, towers: Towers, clip_path: str = "", **options: Any) -> Self:
        """``path`` is the head: a .pth, .pt or .safetensors file, or a folder with ``aesthetic.safetensors``.

        Empty = the released one, downloaded once and checked against its SHA-256.
        ``clip_path`` is the CLIP model; empty = openai/clip-vit-large-patch14, or the bundled one for ``"shapes"``.
        """
        head = load_head(towers.resolve(path) if path else released_head())
        default = "shapes" if path == "shapes" else OPENAI_CLIP_L
        return cls(towers.clip(clip_path or default), head, **options)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Backbone, head and resize."""
        return {"backbone": self.tower.source, "head": self.source, "resize": self.resize}

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """``(B, 3, H, W)`` in ``[0, 1]`` to ``(B,)`` float32; ``prompts`` are ignored."""
        features = self.tower.image_features(images, resize=self.resize)  # (B, D)
        return (features * self.vector.float()).sum(dim=-1) + self.bias.float()


def released_head() -> str:
    """The path of LAION's released head in torch's hub cache, downloaded if it is not there.

    Raises:
        UserError: it cannot be had, or is not the released file.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / RELEASED_HEAD
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(RELEASED_URL, str(file), hash_prefix=RELEASED_SHA256, progress=False)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"rewards: 'aesthetic' has no path, and its released head could not be had from {RELEASED_URL} "
                f"({error}); give path = {RELEASED_HEAD}"
            ) from error
    if hashlib.sha256(file.read_bytes()).hexdigest() != RELEASED_SHA256:
        raise UserError(f"rewards: {str(file)!r} is not the released aesthetic head (wrong SHA-256); delete it")
    return str(file)


def load_head(path: str) -> AestheticHead:
    """Read ``layers.{0,2,4,6,7}.{weight,bias}`` of any widths and multiply them out.

    Args:
        path: a .safetensors file, a folder that holds ``aesthetic.safetensors``, or a .pth or .pt file as released,
            which is read without running anything that it holds.

    Raises:
        UserError: no such file, another ending, not a plain file of tensors, wrong names or shapes.
    """
    return collapse(_read_tensors(path), source=path)


def _read_tensors(path: str) -> dict[str, Tensor]:
    file = Path(path) / HEAD_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"rewards: aesthetic path must be a head file or a folder with {HEAD_FILE}, got {path!r}")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load

            tensors: Any = load(file.read_bytes())
        elif file.suffix in (".pth", ".pt"):
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        else:
            raise UserError(f"rewards: aesthetic path must end in .pth, .pt or .safetensors, got {path!r}")
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(f"rewards: aesthetic path {path!r} holds more than tensors and is refused") from error
    except Exception as error:  # safetensors and torch raise a dozen types for damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"rewards: cannot read aesthetic path {path!r}: {reason}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"rewards: aesthetic path {path!r} must hold named tensors, got {type(tensors).__name__}")
    return tensors


def collapse(head: Mapping[str, Tensor], *, source: str = "") -> AestheticHead:
    """The five linear layers as one, computed in float64: nothing but dropout sits between them, and that is off.

    Raises:
        UserError: missing or unexpected names, or shapes that do not chain to one output.
    """
    expected = {f"layers.{index}.{part}" for index in LAYERS for part in ("weight", "bias")}
    missing, unexpected = expected - set(head), set(head) - expected
    if missing or unexpected:
        raise UserError(
            f"rewards: aesthetic head {source!r} must hold layers.{{0,2,4,6,7}}.{{weight,bias}}; "
            f"missing: {some(missing) or 'none'}; unexpected: {some(unexpected) or 'none'}"
        )
    weight: Tensor | None = None
    bias = torch.zeros(0, dtype=torch.float64)
    for index in LAYERS:
        layer, shift = head[f"layers.{index}.weight"].double(), head[f"layers.{index}.bias"].double()
        width = layer.shape[-1:].numel() if weight is None else weight.shape[0]
        if layer.ndim != 2 or layer.shape[1] != width or shift.shape != (layer.shape[0],):
            raise UserError(
                f"rewards: aesthetic head {source!r}: layers.{index} has weight {tuple(layer.shape)} and bias "
                f"{tuple(shift.shape)}, which does not follow {width} features"
            )
        bias = shift if weight is None else layer @ bias + shift
        weight = layer if weight is None else layer @ weight
    assert weight is not None
    if weight.shape[0] != 1:
        raise UserError(f"rewards: aesthetic head {source!r} must end in 1 output, got {weight.shape[0]}")
    return AestheticHead(vector=weight[0].float(), bias=bias[0].float(), source=source)
