"""Names of a CLIP text encoder's weights, and of LoRA weights on it, in every format that is read or written here.

Inside the project names are *flat* (``encoder.layers.0.mlp.fc1.weight``), as transformers has had them since 5.6.
Files carry the ``text_model.`` level, which older transformers, A1111 and ComfyUI need: there a flat file loads as
random weights. LoRA weights inside are ``<flat module>.lora_A.weight`` ``(rank, in)`` and ``.lora_B.weight``
``(out, rank)``, their product to be scaled by alpha / rank.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastcraft.errors import UserError

PREFIX = "text_model."

_WRAPPERS = ("module.", "base_model.model.")  # DistributedDataParallel (TextCraftor's files), PEFT
_BESIDE = ("text_projection.",)  # beside text_model, not inside, where an encoder has it
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")
_GROUP = re.compile(
    r"(?P<part>(?:text|text_2|unet)\.)?(?:(?:module|base_model|model|text_model)\.)*"
    r"(?P<group>.*?(?:layers|blocks)\.\d+(?=\.)|[^.]+)"
)
_KOHYA = re.compile(
    r"lora_te1?_text_model_encoder_layers_(?P<layer>\d+)_(?P<block>self_attn|mlp)_(?P<linear>[a-z0-9_]+)"
    r"\.(?P<what>lora_down\.weight|lora_up\.weight|alpha)"
)


def parameter_group(name: str) -> str:
    """What a parameter belongs to: ``"embeddings"``, ``"text.encoder.layers.3"``, ``"unet.down_blocks.0"``, ..."""
    match = _GROUP.match(name)
    return f"{match['part'] or ''}{match['group']}" if match else name


def to_flat(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Flat names from flat or prefixed ones, TextCraftor's ``module.`` or PEFT's ``base_model.model.`` ones.

    Position ids, a constant that old files hold, are dropped.
    """
    flat = {}
    for name, tensor in state.items():
        for wrapper in (*_WRAPPERS, PREFIX):
            name = name.removeprefix(wrapper)
        if not name.endswith("position_ids"):
            flat[name] = tensor
    return flat


def to_prefixed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as files carry them, from any that `to_flat` reads."""
    return {name if name.startswith(_BESIDE) else PREFIX + name: tensor for name, tensor in to_flat(state).items()}


def for_module(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The state under the names that ``module`` itself uses: prefixed in transformers before 5.6, flat since."""
    prefixed = any(name.startswith(PREFIX) for name, _ in module.named_parameters())
    return to_prefixed(state) if prefixed else to_flat(state)


def split_lora(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The encoder's own weights and the LoRA weights, both flat, of a model with PEFT layers injected.

    Raises:
        UserError: an adapter that is not plain LoRA on linear layers.
    """
    base, lora = {}, {}
    for name, tensor in to_flat(state).items():
        if match := _LORA.fullmatch(name):
            lora[f"{match['module']}.lora_{match['side']}.weight"] = tensor
        elif ".lora_" in name:
            raise UserError(f"LoRA: only plain adapters of linear layers can be exported, got {name!r}")
        else:
            base[name.replace(".base_layer.", ".")] = tensor
    return base, lora


def merge_lora(base: Mapping[str, Tensor], lora: Mapping[str, Tensor], *, scale: float) -> dict[str, Tensor]:
    """Weights with ``scale * B @ A`` added, in float32; ``base`` is left as it is."""
    merged = dict(base)
    for module in lora_modules(lora):
        low_rank = lora[f"{module}.lora_B.weight"].float() @ lora[f"{module}.lora_A.weight"].float()
        weight = merged[f"{module}.weight"]
        merged[f"{module}.weight"] = (weight.float() + scale * low_rank).to(weight.dtype)
    return merged


def lora_modules(lora: Mapping[str, Tensor]) -> list[str]:
    """Flat names of the adapted linear layers, sorted; each has both its sides.

    Raises:
        UserError: a side is missing, or there are no LoRA weights.
    """
    modules = sorted({name.rpartition(".lora_")[0] for name in lora})
    for module in modules:
        for side in "AB":
            if f"{module}.lora_{side}.weight" not in lora:
                raise UserError(f"LoRA: {module}.lora_{side}.weight is missing")
    if not modules:
        raise UserError("LoRA: there are no adapter weights")
    return modules


def lora_to_diffusers(lora: Mapping[str, Tensor], *, scale: float) -> dict[str, Tensor]:
    """Diffusers' names with ``scale`` (alpha / rank) multiplied into B: no reader can lose it."""
    return {
        f"text_encoder.{PREFIX}{name}": tensor * scale if ".lora_B." in name else tensor
        for name, tensor in lora.items()
    }


def lora_from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse: LoRA weights to be used with scale 1. A UNet's weights in the same file are left out."""
    return split_lora(
        {name.removeprefix("text_encoder."): t for name, t in state.items() if name.startswith("text_encoder.")}
    )[1]


def lora_to_kohya(lora: Mapping[str, Tensor], *, alpha: float) -> dict[str, Tensor]:
    """Kohya's names, which A1111 and ComfyUI read: down, up and alpha per layer."""
    state = {}
    for module in lora_modules(lora):
        down, up = lora[f"{module}.lora_A.weight"], lora[f"{module}.lora_B.weight"]
        name = "lora_te_text_model_" + module.replace(".", "_")
        state[f"{name}.lora_down.weight"] = down
        state[f"{name}.lora_up.weight"] = up
        state[f"{name}.alpha"] = down.new_tensor(alpha)
    return state


def lora_from_kohya(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """The inverse: LoRA weights and alpha. A UNet's weights in the same file are left out.

    Raises:
        UserError: alphas differ between layers, or the file has no text-encoder weights.
    """
    lora: dict[str, Tensor] = {}
    alphas: set[float] = set()
    for name, tensor in state.items():
        if not (match := _KOHYA.fullmatch(name)):
            continue
        module = f"encoder.layers.{match['layer']}.{match['block']}.{match['linear']}"
        if match["what"] == "alpha":
            alphas.add(float(tensor))
        else:
            lora[f"{module}.lora_{'A' if 'down' in match['what'] else 'B'}.weight"] = tensor
    modules = lora_modules(lora)
    if len(alphas) > 1:
        raise UserError(f"LoRA: one alpha for all layers is supported, got {sorted(alphas)}")
    rank = lora[f"{modules[0]}.lora_A.weight"].shape[0]
    return lora, alphas.pop() if alphas else float(rank)


def lora_scale(model: Any, adapter: str = "default") -> tuple[int, float]:
    """``(rank, alpha / rank)`` of the PEFT layers in a model.

    Raises:
        UserError: there are none, or they differ between layers.
    """
    found = {
        (int(layer.r[adapter]), float(layer.scaling[adapter]))
        for layer in model.modules()
        if adapter in getattr(layer, "scaling", ())
    }
    if len(found) != 1:
        raise UserError(f"LoRA: one rank and scale for all layers is supported, got {sorted(found) or 'no adapter'}")
    return found.pop()
