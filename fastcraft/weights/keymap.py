"""Names of weights inside the project and in files.

Inside, a CLIP text encoder's names are *flat* (``encoder.layers.0.mlp.fc1.weight``), as transformers has had them since
5.6; a UNet's are those of diffusers. A text encoder's files carry the ``text_model.`` level, which older transformers,
A1111 and ComfyUI need: there a flat file loads as random weights.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fastcraft.errors import UserError

PREFIX = "text_model."

_WRAPPERS = ("module.", "base_model.model.")  # DistributedDataParallel (TextCraftor's files), PEFT
_BESIDE = ("text_projection",)  # beside text_model, not inside, where an encoder has it
_GROUP = re.compile(
    r"(?P<part>(?:text|text_2|unet)\.)?(?:(?:module|base_model|model|text_model)\.)*"
    r"(?P<group>.*?(?:layers|blocks)\.\d+(?=\.)|[^.]+)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PartNames:
    """How files call one part of a model.

    ``folder``: in a pipeline's folder, and what diffusers puts before the names of LoRA weights. ``kohya``: what kohya
    puts before them; there are two for the first text encoder.
    """

    folder: str
    kohya: tuple[str, ...]


PARTS = {
    "text": PartNames(folder="text_encoder", kohya=("lora_te_", "lora_te1_")),
    "text_2": PartNames(folder="text_encoder_2", kohya=("lora_te2_",)),
    "unet": PartNames(folder="unet", kohya=("lora_unet_",)),
}


def part_names(part: str) -> PartNames:
    """How files call ``part``.

    Raises:
        UserError: an unknown part.
    """
    if part not in PARTS:
        raise UserError(f"part: must be one of {', '.join(PARTS)}, got {part!r}")
    return PARTS[part]


def parameter_group(name: str) -> str:
    """What a parameter belongs to: ``"embeddings"``, ``"text.encoder.layers.3"``, ``"unet.down_blocks.0"``, ..."""
    match = _GROUP.match(name)
    return f"{match['part'] or ''}{match['group']}" if match else name


def flat_name(name: str) -> str:
    """The name inside, of a weight or a module: without ``module.``, PEFT's level or ``text_model.``."""
    for wrapper in (*_WRAPPERS, PREFIX):
        name = name.removeprefix(wrapper)
    return name


def prefixed_name(name: str) -> str:
    """The name that a text encoder's files carry, from any that `flat_name` reads."""
    name = flat_name(name)
    return name if name.startswith(_BESIDE) else PREFIX + name


def to_flat(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`flat_name` of every tensor; position ids, a constant that old files hold, are dropped."""
    return {flat_name(name): tensor for name, tensor in state.items() if not name.endswith("position_ids")}


def to_prefixed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as a text encoder's files carry them, from any that `to_flat` reads."""
    return {prefixed_name(name): tensor for name, tensor in to_flat(state).items()}


def for_module(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The state under the names that ``module`` itself uses: prefixed in transformers before 5.6, else flat."""
    prefixed = any(name.startswith(PREFIX) for name, _ in module.named_parameters())
    return to_prefixed(state) if prefixed else to_flat(state)
