"""The head that aesthetic and ImageReward share: five linear layers with nothing but dropout between them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcraft.errors import UserError
from fastcraft.rewards.tensor_files import some

LAYERS = (0, 2, 4, 6, 7)
"""Positions of the linear layers in the released heads."""
HEAD_NAMES = frozenset(f"layers.{index}.{part}" for index in LAYERS for part in ("weight", "bias"))


@dataclass(frozen=True, kw_only=True, slots=True)
class AffineHead:
    """``score = vector . features + bias``: ``vector`` is ``(D,)`` float32, ``bias`` ``()`` float32."""

    vector: Tensor
    bias: Tensor
    source: str
    """Where it came from, for records and messages."""


def collapse(head: Mapping[str, Tensor], *, source: str = "") -> AffineHead:
    """The five linear layers as one, computed in float64: nothing but dropout sits between them, and that is off.

    Raises:
        UserError: missing or unexpected names, or shapes that do not chain to one output.
    """
    missing, unexpected = HEAD_NAMES - set(head), set(head) - HEAD_NAMES
    if missing or unexpected:
        raise UserError(
            f"rewards: head {source!r} must hold layers.{{0,2,4,6,7}}.{{weight,bias}}; "
            f"missing: {some(missing) or 'none'}; unexpected: {some(unexpected) or 'none'}"
        )
    weight: Tensor | None = None
    bias = torch.zeros(0, dtype=torch.float64)
    for index in LAYERS:
        layer, shift = head[f"layers.{index}.weight"].double(), head[f"layers.{index}.bias"].double()
        width = layer.shape[-1:].numel() if weight is None else weight.shape[0]
        if layer.ndim != 2 or layer.shape[1] != width or shift.shape != (layer.shape[0],):
            raise UserError(
                f"rewards: head {source!r}: layers.{index} has weight {tuple(layer.shape)} and bias "
                f"{tuple(shift.shape)}, which does not follow {width} features"
            )
        bias = shift if weight is None else layer @ bias + shift
        weight = layer if weight is None else layer @ weight
    assert weight is not None
    if weight.shape[0] != 1:
        raise UserError(f"rewards: head {source!r} must end in 1 output, got {weight.shape[0]}")
    return AffineHead(vector=weight[0].float(), bias=bias[0].float(), source=source)
