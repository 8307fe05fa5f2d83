"""LoRA files with kohya's names, which A1111 and ComfyUI read: down, up and alpha for every layer.

A layer is ``lora_te_`` (``lora_te1_`` and ``lora_te2_`` where there are two text encoders) or ``lora_unet_`` and its
name with underscores for dots, so reading takes the model's own names. Of a UNet the names of Stability's code are read
too.
"""

from collections.abc import Collection, Mapping

from torch import Tensor

from fastcraft.errors import UserError
from fastcraft.weights.keymap import PARTS, flat_name, part_names, prefixed_name
from fastcraft.weights.ldm_names import ldm_names
from fastcraft.weights.parts import lora_modules

_REFUSED = {
    "hada_": "LoHa", "lokr_": "LoKr", "lora_mid": "LoRA with a Tucker core", "dora_scale": "DoRA",
    ".diff": "differences of whole weights",
}  # fmt: skip
_SIDES = {"lora_down.weight": "A", "lora_up.weight": "B"}

ARCHITECTURES = {
    "sd_v1": "stable-diffusion-v1",
    "sd_v2": "stable-diffusion-v2-768-v",
    "sdxl_base_v1-0": "stable-diffusion-xl-v1-base",
}
"""Kohya's name of a base model, and that of the SAI model specification."""


def to_kohya(
    part: str, lora: Mapping[str, Tensor], scaling: Mapping[str, float], *, two_encoders: bool = False
) -> dict[str, Tensor]:
    """Names of kohya; ``two_encoders``: the model has two, as SDXL."""
    prefix = part_names(part).kohya[-1 if two_encoders else 0]
    state = {}
    for module in lora_modules(lora):
        down, up = lora[f"{module}.lora_A.weight"], lora[f"{module}.lora_B.weight"]
        name = _alias(part, module, prefix)
        state[f"{name}.lora_down.weight"] = down
        state[f"{name}.lora_up.weight"] = up
        state[f"{name}.alpha"] = down.new_tensor(scaling[module] * down.shape[0])
    return state


def is_kohya(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are kohya's."""
    return any(name.startswith(prefix) for name in state for part in PARTS.values() for prefix in part.kohya)


def from_kohya(
    state: Mapping[str, Tensor], part: str, module_names: Collection[str], *, source: str = "LoRA"
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """LoRA weights and scaling of one part under the names inside; other parts in the file are left out.

    A layer without alpha has alpha = rank. Where a file names layers in diffusers' way and in Stability's, diffusers'
    count.

    Raises:
        UserError: nothing for this part, a layer that the model does not have, or another kind of adapter, by name.
    """
    matching = {name: tensor for name, tensor in state.items() if name.startswith(part_names(part).kohya)}
    if not matching:
        there = [other for other, names in PARTS.items() if any(name.startswith(names.kohya) for name in state)]
        raise UserError(f"{source}: holds no LoRA of part {part!r}, only of {', '.join(there) or 'none'}")
    for name in matching:
        for mark, kind in _REFUSED.items():
            if mark in name:
                raise UserError(f"{source}: must be a plain LoRA adapter, got {kind} ({name!r})")
    first, second = _aliases(part, [flat_name(name) for name in module_names])
    lora: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for name, tensor in sorted(
        matching.items(), key=lambda item: item[0].partition(".")[0] in first
    ):  # `first` is last
        alias, _, what = name.partition(".")
        module = first.get(alias) or second.get(alias)
        if module is None:
            raise UserError(f"{source}: the model has no layer {alias!r}")
        if what == "alpha":
            alphas[module] = float(tensor)
        elif what in _SIDES:
            lora[f"{module}.lora_{_SIDES[what]}.weight"] = tensor
        else:
            raise UserError(f"{source}: must be a plain LoRA adapter, got {name!r}")
    ranks = {module: lora[f"{module}.lora_A.weight"].shape[0] for module in lora_modules(lora, source=source)}
    return lora, {module: alphas.get(module, rank) / rank for module, rank in ranks.items()}


def kohya_metadata(
    ranks: Collection[int], alphas: Collection[float], *, base_model_version: str, title: str, resolution: int
) -> dict[str, str]:
    """What kohya's tools and the SAI model specification 1.0.1 ask for; nothing about this machine.

    Sizes that differ between layers are called Dynamic, as kohya's own tools do.
    """
    if base_model_version not in ARCHITECTURES:
        raise UserError(f"base_model_version: must be one of {', '.join(ARCHITECTURES)}, got {base_model_version!r}")
    return {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": _one({str(rank) for rank in ranks}),
        "ss_network_alpha": _one({f"{alpha:g}" for alpha in alphas}),
        "ss_base_model_version": base_model_version,
        "ss_output_name": title,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{ARCHITECTURES[base_model_version]}/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.resolution": f"{resolution}x{resolution}",
    }


def _one(values: set[str]) -> str:
    return values.pop() if len(values) == 1 else "Dynamic"


def _alias(part: str, module: str, prefix: str) -> str:
    return prefix + (prefixed_name(module) if part.startswith("text") else module).replace(".", "_")


def _aliases(part: str, modules: Collection[str]) -> tuple[dict[str, str], dict[str, str]]:
    """From the names in a file to the model's: by its own names, and by those of Stability's code."""
    matching = {_alias(part, module, prefix): module for prefix in part_names(part).kohya for module in modules}
    if part != "unet":
        return matching, {}
    return matching, {_alias(part, ldm, "lora_unet_"): module for module, ldm in ldm_names(modules).items()}
