"""Files of tensors, read without running anything that they hold."""

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcraft.errors import UserError

ENDINGS = (".safetensors", ".bin", ".pth", ".pt")


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Named tensors of a safetensors file or of one by ``torch.save``, on the CPU.

    Of a training checkpoint its ``state_dict`` counts.

    Raises:
        UserError: not there, another ending, not named tensors, damaged or cut short.
    """
    if file.suffix not in ENDINGS:
        raise UserError(f"{file}: a file of weights must end in {', '.join(ENDINGS)}")
    try:
        content = _load(file)
    except FileNotFoundError as error:
        raise UserError(f"{file}: there is no such file") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{file}: must hold nothing but tensors, got other objects too") from error
    except Exception as error:  # safetensors and torch raise a dozen types for damaged files
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{file}: cannot be read: {first}") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise UserError(f"{file}: must hold named tensors, got {type(content).__name__}")
    return dict(content)


def read_sharded(index: Path) -> dict[str, Tensor]:
    """Tensors of the files that a ``*.index.json`` names.

    Raises:
        UserError: as `read_tensors`; a file outside the index's folder.
    """
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    if any(Path(name).name != name for name in names):
        raise UserError(f"{index}: files must lie beside the index, got {names}")
    return {name: tensor for file in names for name, tensor in read_tensors(index.parent / file).items()}


def read_metadata(file: Path) -> dict[str, str]:
    """A safetensors file's own notes; empty for other files."""
    if file.suffix != ".safetensors":
        return {}
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata() or {})


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: not there, or something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: must hold a JSON object, got {type(content).__name__}")
    return content


def _load(file: Path) -> Any:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
