"""Weights of one part, from everything that people keep them in."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from fastcraft.errors import UserError
from fastcraft.weights.files import read_json, read_metadata, read_sharded, read_tensors
from fastcraft.weights.keymap import flat_name, part_names, to_flat
from fastcraft.weights.lora_diffusers import from_diffusers
from fastcraft.weights.lora_kohya import from_kohya, is_kohya
from fastcraft.weights.parts import PartWeights

LORA_FILE = "pytorch_lora_weights.safetensors"
_MODEL_FILES = (
    "model.safetensors", "diffusion_pytorch_model.safetensors", "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors.index.json", "model.fp16.safetensors",
    "diffusion_pytorch_model.fp16.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.bin",
)  # fmt: skip
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_CHECKPOINT = ("model.diffusion_model.", "cond_stage_model.", "conditioner.embedders.", "first_stage_model.")


def read_weights(path: str | Path, part: str, module_names: Collection[str]) -> PartWeights:
    """The weights of ``part`` at ``path``, whole or LoRA, under the names inside, on the CPU.

    Args:
        path: a run's directory or its ``export``; a pipeline's folder; a model's folder of transformers or diffusers;
            a PEFT adapter's folder; a folder with `LORA_FILE`; a file of whole weights (flat names, ``text_model.`` or
            ``module.`` before them) or of LoRA weights (diffusers' names or kohya's). Of a folder with both, the whole
            weights are read; the file of a LoRA can be named itself.
        part: "text", "text_2" or "unet".
        module_names: ``[name for name, _ in model.named_modules()]`` of the model that they are for.

    Raises:
        UserError: nothing there, nothing for this part, an unknown kind of adapter, a layer that the model lacks.
            Shapes are checked where the weights are used, by `apply_weights`.
    """
    path = Path(path).expanduser()
    folder = part_names(part).folder
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder")
    if path.is_file():
        return _from_file(path, part, module_names)
    path = path / "export" if (path / "export").is_dir() else path
    if (path / "adapter_config.json").is_file():
        return _from_peft(path, part, module_names)
    for place in (path / folder, path):
        for name in _MODEL_FILES:
            if (place / name).is_file():
                return _whole(place / name, part, module_names)
    for place in (path / "lora", path):
        if (place / LORA_FILE).is_file():
            return _from_file(place / LORA_FILE, part, module_names)
    raise UserError(f"{path}: must hold {folder}, lora, an adapter or a file of weights, got {_listing(path)}")


def _from_file(file: Path, part: str, module_names: Collection[str]) -> PartWeights:
    if file.name in _ADAPTER_FILES and (file.parent / "adapter_config.json").is_file():
        return _from_peft(file.parent, part, module_names)
    if file.name.endswith(".index.json"):
        return _whole(file, part, module_names)
    state = read_tensors(file)
    source = str(file)
    if is_kohya(state):
        lora, scaling = from_kohya(state, part, module_names, source=source)
    elif any("lora" in name for name in state):
        if any(name.startswith("base_model.model.") for name in state):
            raise UserError(f"{file}: a PEFT adapter must have its adapter_config.json beside it; alpha is in there")
        settings = _settings(file, part_names(part).folder)
        lora, scaling = from_diffusers(state, part, module_names, settings=settings, source=source)
    else:
        return _whole(file, part, module_names, state)
    return PartWeights(lora=lora, scaling=scaling, source=source)


def _settings(file: Path, folder: str) -> dict[str, Any]:
    """What newer diffusers notes of PEFT's settings in a LoRA file, by part."""
    try:
        settings = json.loads(read_metadata(file).get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        raise UserError(f"{file}: lora_adapter_metadata is not JSON: {error}") from error
    return {name.removeprefix(f"{folder}."): value for name, value in settings.items() if name.startswith(f"{folder}.")}


def _from_peft(folder: Path, part: str, module_names: Collection[str]) -> PartWeights:
    files = [folder / name for name in _ADAPTER_FILES if (folder / name).is_file()]
    if not files:
        raise UserError(f"{folder}: must hold {' or '.join(_ADAPTER_FILES)}, got {_listing(folder)}")
    settings = read_json(folder / "adapter_config.json")
    lora, scaling = from_diffusers(read_tensors(files[0]), part, module_names, settings=settings, source=str(files[0]))
    return PartWeights(lora=lora, scaling=scaling, source=str(files[0]))


def _whole(file: Path, part: str, module_names: Collection[str], state: dict[str, Tensor] | None = None) -> PartWeights:
    """Whole weights; of anything else, so that it is not called by a thousand missing names, say what it is."""
    if state is None:
        state = read_sharded(file) if file.name.endswith(".index.json") else read_tensors(file)
    if any(name.startswith(_CHECKPOINT) for name in state):
        raise UserError(f"{file}: must hold the weights of one part, got a checkpoint of a whole model")
    whole = to_flat(state)
    known = {flat_name(name) for name in module_names}
    if not any(name.rpartition(".")[0] in known for name in whole):
        first = next(iter(state), "nothing")
        raise UserError(f"{file}: must hold weights of part {part!r}, got {first!r} (of {len(state)} tensors)")
    return PartWeights(whole=whole, source=str(file))


def _listing(folder: Path, limit: int = 5) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "") or "nothing"
