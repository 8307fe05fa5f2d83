"""Load a Stable Diffusion 1.x or 2.x model: one of the two files that import diffusers.

A folder as `StableDiffusionPipeline.save_pretrained` writes it, or a hub id, becomes frozen `Components`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastcraft.diffusion.schedule import NoiseSchedule
from fastcraft.errors import UserError

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


@dataclass(frozen=True, kw_only=True)
class Components:
    """The parts of a latent diffusion model.

    ``text_encoder`` is a float32 ``CLIPTextModel``; ``unet`` and ``vae`` are frozen, in eval mode, in the dtype asked
    for. ``latent_shape`` is ``(C, H / f, W / f)`` for the resolution in use, f = ``pixels_per_latent`` (8 for SD).
    """

    folder: Path
    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    schedule: NoiseSchedule
    latent_shape: tuple[int, int, int]
    pixels_per_latent: int


def load_components(
    path: str | Path, *, dtype: torch.dtype, device: torch.device, resolution: int = 0,
    unet_dtype: torch.dtype | None = None,
) -> Components:  # fmt: skip
    """Load every part from ``path``, a folder or a hub id.

    Args:
        path: the pipeline folder or hub id.
        dtype: of UNet and VAE; the text encoder is float32, because it will be trained.
        device: where the parts go.
        resolution: width and height of the pictures, pixels; 0 = the UNet's own.
        unet_dtype: of the UNet, where it is to be another one, for training; None = ``dtype``.

    Raises:
        UserError: no such folder, a part missing or corrupt, weights that do not match the architecture, a pickle that
            `weights_only` loading refuses, a scheduler that `NoiseSchedule` refuses, or a model that is not Stable
            Diffusion 1.x or 2.x.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = _local_folder(str(path))
    _check_layout(folder)
    schedule = _load_schedule(folder / "scheduler")
    unet = _load(UNet2DConditionModel, folder / "unet", torch_dtype=unet_dtype or dtype)
    vae = _load(AutoencoderKL, folder / "vae", torch_dtype=dtype)
    text_encoder = _load(CLIPTextModel, folder / "text_encoder", dtype=torch.float32)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"path: cannot load {folder / 'tokenizer'}: {_first_line(error)}") from error
    for module in (unet, vae):
        freeze(module).to(device)
    if device.type == "cpu" and dtype == torch.bfloat16:
        # the attention in the middle leaves pictures channels-last, whose group norm is slow in backward here (LOG.md)
        vae.decoder.mid_block.register_forward_hook(_contiguous)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    size = latent_size(resolution, factor, unet.config.sample_size)
    if unet.config.cross_attention_dim != text_encoder.config.hidden_size:
        raise UserError(
            f"path: the UNet reads text of width {unet.config.cross_attention_dim}, the text encoder gives "
            f"{text_encoder.config.hidden_size}"
        )
    return Components(
        folder=folder,
        unet=unet,
        vae=vae,
        text_encoder=text_encoder.to(device).eval(),
        tokenizer=tokenizer,
        schedule=schedule,
        latent_shape=(unet.config.in_channels, size, size),
        pixels_per_latent=factor,
    )


def load_skeletons(folder: str | Path) -> tuple[Any, Any]:
    """UNet and VAE of a diffusers folder, any Stable Diffusion model, without their weights (on the meta device).

    Raises:
        UserError: no such folder, or a part that cannot be built from its config.json.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel

    folder = Path(folder).expanduser()
    parts = []
    for cls, name in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae")):
        if not (folder / name / "config.json").is_file():
            raise UserError(f"{folder} has no {name}/config.json")
        try:
            with torch.device("meta"):
                parts.append(freeze(cls.from_config(cls.load_config(folder / name))))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"cannot build {folder / name}: {_first_line(error)}") from error
    return parts[0], parts[1]


def empty_networks(
    unet: Mapping[str, Any], vae: Mapping[str, Any], text_encoders: Sequence[Mapping[str, Any]], *, dtype: torch.dtype
) -> tuple[Any, Any, list[Any]]:
    """Frozen networks without weights, on the meta device, from the contents of their ``config.json``.

    Args:
        unet: of a ``UNet2DConditionModel``; SDXL's embedding of pooled text and sizes is left out.
        vae: of an ``AutoencoderKL``.
        text_encoders: of each ``CLIPTextModel``, which is float32.
        dtype: of UNet and VAE.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        parts = (
            UNet2DConditionModel.from_config({**unet, "addition_embed_type": None}),
            AutoencoderKL.from_config(dict(vae)),
        )
        texts = [CLIPTextModel(CLIPTextConfig(**config)) for config in text_encoders]
    frozen = [nn.Module.to(freeze(part), dtype) for part in parts]  # diffusers' own `to` warns about nothing here
    return *frozen, [text.eval() for text in texts]  # type: ignore[return-value]


def latent_size(resolution: int, factor: int, sample_size: int) -> int:
    """Height and width of the latents of a picture of ``resolution`` pixels; 0 = the model's own ``sample_size``.

    Raises:
        UserError: not a multiple of what the UNet halves.
    """
    if not resolution:
        return int(sample_size)
    if resolution % (8 * factor):
        raise UserError(f"resolution must be a multiple of {8 * factor}, got {resolution}")
    return resolution // factor


def freeze(module: nn.Module) -> nn.Module:
    """Eval mode, no parameter requires gradient."""
    return module.requires_grad_(False).eval()


def _local_folder(path: str) -> Path:
    """``path`` itself when it is a folder; else the hub snapshot of that id, downloaded if need be."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(f"path: expected a model folder or a hub id 'owner/name', got {path!r}")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                path,
                allow_patterns=["model_index.json", *(f"{part}/*" for part in PARTS)],
                ignore_patterns=["*.bin", "*.ckpt", "*.msgpack", "*.onnx*", "*.fp16.*", "*non_ema*"],
            )
        )
    except Exception as error:  # the hub client's errors share no base class
        raise UserError(f"path: no folder {path!r}, and the hub gave: {_first_line(error)}") from error


def _check_layout(folder: Path) -> None:
    index = folder / "model_index.json"
    try:
        names = json.loads(index.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"path: {folder} has no readable model_index.json ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"path: {index} is not JSON: {error}") from error
    if "text_encoder_2" in names or "text_encoder" not in names or "unet" not in names:
        raise UserError(
            f"path: expected a Stable Diffusion 1.x or 2.x folder, got {names.get('_class_name', 'unknown')!r}"
        )
    for part in PARTS:
        if not (folder / part).is_dir():
            raise UserError(f"path: {folder} lacks the folder {part!r}")


def _load_schedule(folder: Path) -> NoiseSchedule:
    """The noise schedule of any scheduler's folder; without ``clip_sample`` it does not clip, unlike DDIM's default."""
    from diffusers import DDIMScheduler

    try:
        config = DDIMScheduler.load_config(folder)
        scheduler = DDIMScheduler.from_config(config, clip_sample=config.get("clip_sample", False))
        return NoiseSchedule.from_diffusers(scheduler)
    except NotImplementedError as error:
        raise UserError(f"path: {folder}: beta_schedule {config.get('beta_schedule')!r} is not supported") from error
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"path: cannot load {folder}: {_first_line(error)}") from error


def _load(cls: Any, folder: Path, **kwargs: Any) -> Any:
    """``from_pretrained`` that refuses weights which do not cover the architecture."""
    try:
        model, info = cls.from_pretrained(folder, local_files_only=True, output_loading_info=True, **kwargs)
    except Exception as error:  # safetensors, pickle, OS and shape errors share no base class
        raise UserError(f"path: cannot load {folder}: {_first_line(error)}") from error
    missing = [key for key in info["missing_keys"] if not key.endswith("position_ids")]
    foreign = [key for key in info["unexpected_keys"] if not key.endswith("position_ids")]
    if missing or foreign or info.get("mismatched_keys"):
        raise UserError(
            f"path: weights in {folder} do not match the architecture: {len(missing)} missing "
            f"{sorted(missing)[:3]}, {len(foreign)} unexpected {sorted(foreign)[:3]}"
        )
    return model


def _contiguous(module: nn.Module, inputs: Any, picture: torch.Tensor) -> torch.Tensor:
    return picture.contiguous()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
