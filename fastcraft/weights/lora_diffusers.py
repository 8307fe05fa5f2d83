"""LoRA files as diffusers and PEFT write them.

Written here: ``<folder>.<module>.lora_A.weight`` and ``.lora_B.weight`` with the scale multiplied into B, which no
reader can lose. Read: these; names of older diffusers (``.processor.to_q_lora.down``, ``.lora.up``,
``.lora_linear_layer.down``); PEFT's own; alpha from the tensors, or from the settings of PEFT that a file or an
adapter's folder carries.
"""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from fastcraft.errors import UserError
from fastcraft.weights.keymap import PARTS, flat_name, part_names, prefixed_name
from fastcraft.weights.parts import lora_modules

_NAME = re.compile(
    r"(?P<module>.+?)(?:\.lora_(?P<side>[AB])(?:\.[^.]+)?|[._]lora(?:_linear_layer)?\.(?P<way>down|up))\.weight"
)
_OLD_TEXT = re.compile(r"\.to_(q|k|v|out)$")


def to_diffusers(part: str, lora: Mapping[str, Tensor], scaling: Mapping[str, float]) -> dict[str, Tensor]:
    """Names of diffusers, with ``scaling`` multiplied into B."""
    folder = part_names(part).folder
    state = {}
    for module in lora_modules(lora):
        name = f"{folder}.{prefixed_name(module) if part.startswith('text') else module}"
        state[f"{name}.lora_A.weight"] = lora[f"{module}.lora_A.weight"]
        state[f"{name}.lora_B.weight"] = lora[f"{module}.lora_B.weight"] * scaling[module]
    return state


def from_diffusers(
    state: Mapping[str, Tensor],
    part: str,
    module_names: Collection[str],
    *,
    settings: Mapping[str, Any] | None = None,
    source: str = "LoRA",
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """LoRA weights and scaling of one part under the names inside; other parts in the file are left out.

    Args:
        state: the file's tensors. Names without a part's prefix are taken for the part that is asked for.
        part: "text", "text_2" or "unet".
        module_names: of the model.
        settings: what PEFT would be told: ``lora_alpha``, ``use_rslora``, ``alpha_pattern``, ``use_dora``; without
            them, and without an ``.alpha``, the scale is 1.
        source: for messages.

    Raises:
        UserError: nothing for this part, a layer that the model does not have, or an adapter that is not plain LoRA.
    """
    settings = settings or {}
    if settings.get("use_dora") or settings.get("peft_type", "LORA") != "LORA":
        kind = "DoRA" if settings.get("use_dora") else settings["peft_type"]
        raise UserError(f"{source}: must be a plain LoRA adapter, got {kind}")
    names = {flat_name(name) for name in module_names}
    lora: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for name, tensor in _of_part(state, part, source).items():
        old = name.replace(".processor.", ".")
        if old.endswith(".alpha"):
            alphas[_layer(old.removesuffix(".alpha"), names, source)] = float(tensor)
        elif match := _NAME.fullmatch(old):
            side = match["side"] or {"down": "A", "up": "B"}[match["way"]]
            lora[f"{_layer(match['module'], names, source)}.lora_{side}.weight"] = tensor
        else:
            raise UserError(f"{source}: must be a plain LoRA adapter, got {name!r}")
    modules = lora_modules(lora, source=source)
    ranks = {module: lora[f"{module}.lora_A.weight"].shape[0] for module in modules}
    return lora, {module: _scaling(settings, alphas, module, ranks[module]) for module in modules}


def _of_part(state: Mapping[str, Tensor], part: str, source: str) -> dict[str, Tensor]:
    prefix = f"{part_names(part).folder}."
    there = [other for other, names in PARTS.items() if any(name.startswith(f"{names.folder}.") for name in state)]
    if not there:
        return {flat_name(name): tensor for name, tensor in state.items()}
    if part not in there:
        raise UserError(f"{source}: holds no LoRA of part {part!r}, only of {', '.join(there)}")
    return {flat_name(name.removeprefix(prefix)): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _layer(module: str, names: Collection[str], source: str) -> str:
    """The model's name of a layer; before PEFT, diffusers named its processors' layers after their roles."""
    for candidate in (f"{module}.0" if module.endswith(".to_out") else module, _OLD_TEXT.sub(r".\1_proj", module)):
        if candidate in names:
            return candidate
    raise UserError(f"{source}: the model has no layer {module!r}")


def _scaling(settings: Mapping[str, Any], alphas: Mapping[str, float], module: str, rank: int) -> float:
    """The layer's own alpha, or PEFT's rule; patterns are regular expressions for the end of a name."""
    if module in alphas:
        return alphas[module] / rank
    alpha = settings.get("lora_alpha", rank)
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
