"""Write the trained networks as the folders that real checkpoints come in, in half precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from fastcraft.shapes.networks import build_scheduler
from fastcraft.shapes.scenes import IMAGE_SIZE
from fastcraft.shapes.tokens import save_tokenizer
from fastcraft.shapes.train_clip import CLIP_MEAN, CLIP_STD, RewardModel

PREFIX = "text_model."


def text_half(clip: Any) -> CLIPTextModel:
    """The text tower of a CLIP as a model of its own, with the same weights."""
    encoder = CLIPTextModel(clip.config.text_config)
    state = {key.removeprefix(PREFIX): value for key, value in clip.text_model.state_dict().items()}
    nested = next(iter(encoder.state_dict())).startswith(PREFIX)
    encoder.load_state_dict({(PREFIX if nested else "") + key: value for key, value in state.items()})
    return encoder.eval().requires_grad_(False)


def _prefix_keys(file: Path) -> None:
    """Name text tensors as transformers before version 5 does: later versions read both, earlier ones only this."""
    state = load_file(file)
    state = {key if key.startswith(PREFIX) else PREFIX + key: value for key, value in state.items()}
    save_file(state, file, metadata={"format": "pt"})


def _forget_paths(folder: Path) -> None:
    """Take the paths of the machine that saved them out of all configurations."""
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def export_pipeline(
    folder: Path, vae: AutoencoderKL, encoder: CLIPTextModel, unet: UNet2DConditionModel, tokenizer: CLIPTokenizer
) -> None:
    """Save a complete StableDiffusionPipeline folder in float16. The networks are converted in place."""
    pipeline: Any = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16)
    pipeline.save_pretrained(folder)
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    save_tokenizer(folder / "tokenizer")
    _prefix_keys(folder / "text_encoder" / "model.safetensors")
    _forget_paths(folder)


def export_reward(folder: Path, model: RewardModel) -> None:
    """Save the reward CLIP with tokenizer and preprocessing, and `aesthetic.safetensors`, in float16, in place."""
    model.half()
    model.clip.save_pretrained(folder)
    save_file(
        {key: value.contiguous() for key, value in model.head.state_dict().items()}, folder / "aesthetic.safetensors"
    )
    save_tokenizer(folder)
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": IMAGE_SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1.0 / 255.0,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n", encoding="utf-8")
    _forget_paths(folder)
