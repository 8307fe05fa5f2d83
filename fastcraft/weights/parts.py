"""The weights of one part of a model, whole or as LoRA, and how the two come together in float32."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastcraft.errors import UserError
from fastcraft.weights.keymap import flat_name, for_module, to_flat

_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")
_BASE = re.compile(r"(?P<module>.+)\.base(?:_layer)?\.(?P<what>weight|bias)")


@dataclass(frozen=True, kw_only=True, slots=True)
class PartWeights:
    """Weights under the names that the project uses inside (see `keymap`).

    ``whole``: every weight of the part, or None. ``lora``: ``<module>.lora_A.weight`` ``(r, in)`` or ``(r, in, k, k)``
    and ``<module>.lora_B.weight`` ``(out, r)`` or ``(out, r, 1, 1)``, or None. ``scaling``: by module, what their
    product is multiplied by. Where there are both, ``lora`` is to be added to ``whole``. ``source``: for messages.
    """

    whole: dict[str, Tensor] | None = None
    lora: dict[str, Tensor] | None = None
    scaling: dict[str, float] = field(default_factory=dict)
    source: str = ""


def part_weights(model: nn.Module) -> PartWeights:
    """What a model holds: its own weights and, if it has LoRA layers (ours or PEFT's), the adapters.

    On the CPU; a model that lies there shares its memory with what is returned.

    Raises:
        UserError: an adapter that is not plain LoRA.
    """
    whole, lora = split_lora({name: tensor.detach().cpu() for name, tensor in model.state_dict().items()})
    return PartWeights(whole=whole, lora=lora or None, scaling=lora_scaling(model), source=type(model).__name__)


def split_lora(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dict's own weights and its LoRA weights, apart, under the names inside.

    Raises:
        UserError: an adapter that is not plain LoRA.
    """
    rest: dict[str, Tensor] = {}
    lora: dict[str, Tensor] = {}
    for name, tensor in to_flat(state).items():
        if match := _LORA.fullmatch(name):
            lora[f"{match['module']}.lora_{match['side']}.weight"] = tensor
        elif ".lora_" in name:
            raise UserError(f"LoRA: only plain adapters can be read and written, got {name!r}")
        else:
            rest[name] = tensor
    wrapped = {name.rpartition(".lora_")[0] for name in lora}
    base = {}
    for name, tensor in rest.items():
        match = _BASE.fullmatch(name)
        inside = match is not None and match["module"] in wrapped
        base[f"{match['module']}.{match['what']}" if match and inside else name] = tensor
    return base, lora


def lora_scaling(model: nn.Module) -> dict[str, float]:
    """By module, what its LoRA layer multiplies B A by; empty without LoRA.

    Raises:
        UserError: PEFT layers with more than one adapter.
    """
    scaling: dict[str, float] = {}
    for name, layer in model.named_modules():
        value: Any = getattr(layer, "scaling", None)
        if value is None or not hasattr(layer, "lora_A"):
            continue
        if isinstance(value, Mapping):  # PEFT: by adapter
            if len(value) != 1:
                raise UserError(f"LoRA: one adapter can be written, {name} has {sorted(value)}")
            value = next(iter(value.values()))
        scaling[flat_name(name)] = float(value)
    return scaling


def lora_modules(lora: Mapping[str, Tensor], *, source: str = "LoRA") -> list[str]:
    """Names of the adapted layers, sorted; each has both its sides, and these fit together.

    Raises:
        UserError: a side is missing, their ranks differ, or there are no LoRA weights.
    """
    modules = sorted({name.rpartition(".lora_")[0] for name in lora})
    for module in modules:
        for side in "AB":
            if f"{module}.lora_{side}.weight" not in lora:
                raise UserError(f"{source}: {module}.lora_{side}.weight is missing")
        down, up = lora[f"{module}.lora_A.weight"], lora[f"{module}.lora_B.weight"]
        if down.dim() < 2 or up.dim() < 2 or up.shape[1] != down.shape[0] or up.shape[2:].numel() != 1:
            raise UserError(f"{source}: {module}: lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)} do not fit")
    if not modules:
        raise UserError(f"{source}: there are no adapter weights")
    return modules


def merge_lora(
    base: Mapping[str, Tensor], lora: Mapping[str, Tensor], scaling: Mapping[str, float], *, source: str = "LoRA"
) -> dict[str, Tensor]:
    """Weights with ``scaling * B A`` added: those of adapted layers are new float32 tensors.

    Raises:
        UserError: an adapter for a layer that is not there, or of another width.
    """
    merged = dict(base)
    for module in lora_modules(lora, source=source):
        name = f"{module}.weight"
        if name not in merged:
            raise UserError(f"{source}: the model has no layer {module!r}")
        down, up = (lora[f"{module}.lora_{side}.weight"].to(merged[name].device).float() for side in "AB")
        weight = merged[name].float()
        product = up.flatten(1) @ down.flatten(1)
        adapter, layer = ((len(up), *down.shape[1:]), tuple(weight.shape))
        if _without_ones(adapter) != _without_ones(layer):
            raise UserError(f"{source}: the adapter of {module} must be for a weight {layer}, got {adapter}")
        merged[name] = weight + scaling[module] * product.view(weight.shape)
    return merged


@torch.no_grad()
def apply_weights(model: nn.Module, weights: PartWeights) -> None:
    """Put whole weights into a model, and merge LoRA into the model's weights in float32: a start for training.

    Args:
        model: without LoRA layers; its parameters keep their dtype and device, and change in place.
        weights: of the same part. Nothing is changed unless everything fits.

    Raises:
        UserError: a weight is missing, unknown, or of another shape.
        ValueError: the model has LoRA layers.
    """
    if lora_scaling(model):
        raise ValueError("apply_weights: the model has LoRA layers; give it the weights before they are injected")
    expected = to_flat(model.state_dict())
    new = expected
    if weights.whole is not None:
        check_weights(expected, weights.whole, source=weights.source)
        new = weights.whole
    if weights.lora is not None:
        new = merge_lora(new, weights.lora, weights.scaling, source=weights.source)
    model.load_state_dict(for_module(new, model))


def check_weights(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], *, source: str) -> None:
    """Raise a `UserError` unless both have the same names and shapes."""
    missing, unknown = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing or unknown:
        raise UserError(
            f"{source}: must hold exactly the weights of the model; "
            f"missing: {_some(missing)}; unknown: {_some(unknown)}"
        )
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise UserError(
                f"{source}: {name} must have the shape {tuple(tensor.shape)}, got {tuple(found[name].shape)}"
            )


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A linear layer and a 1x1 convolution have the same weight."""
    return shape[:2] if all(size == 1 for size in shape[2:]) else shape


def _some(names: set[str], limit: int = 3) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(sorted(names)[:limit]) + rest) or "none"
