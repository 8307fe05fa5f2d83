"""The image half of a reward's model for those who only want to look at it: its modules, its shapes."""

from pathlib import Path

import torch
from torch import nn

from fastcraft.errors import UserError
from fastcraft.rewards.blip import load_blip
from fastcraft.rewards.open_clip import OPEN_CLIP_FILES, load_open_clip
from fastcraft.rewards.tensor_files import ENDINGS, first_line, read_tensors


def image_skeleton(path: str | Path) -> nn.Module:
    """A ``CLIPVisionModel`` or ``BlipVisionModel``.

    Args:
        path: a folder with the ``config.json`` of a ``CLIPModel``, of which nothing else is read; or an open_clip or
            ImageReward file or an open_clip folder, whose weights are read, because their shapes say what the model is.

    Raises:
        UserError: nothing of that kind is there.
    """
    place = Path(path).expanduser()
    if (place / "config.json").is_file():
        return _from_config(place)
    files = [place, *(place / name for name in (*OPEN_CLIP_FILES, "ImageReward.pt"))]
    file = next((file for file in files if file.is_file() and file.suffix in ENDINGS), None)
    if file is None:
        raise UserError(f"--model: {place} is neither a diffusers folder nor a CLIP folder nor a reward's weights")
    if any(name.startswith("blip.") for name in read_tensors(file, reward="the image tower")):
        return load_blip(file, dtype=torch.float32)[0]
    return load_open_clip(file, dtype=torch.float32).vision_model


def _from_config(folder: Path) -> nn.Module:
    from transformers import AutoConfig, CLIPConfig, CLIPModel

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--model: cannot read {folder / 'config.json'}: {first_line(error)}") from error
    if not isinstance(config, CLIPConfig):
        raise UserError(f"--model: {folder} must hold a CLIPModel, got model type {config.model_type!r}")
    with torch.device("meta"):
        network: nn.Module = CLIPModel(config).vision_model
    return network
