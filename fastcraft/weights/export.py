"""Whole weights that other programs load, each export verified by loading it again and comparing what it computes."""

import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastcraft.durable import write_folder, write_json, write_tensors
from fastcraft.weights.export_lora import export_lora
from fastcraft.weights.keymap import part_names, to_flat, to_prefixed
from fastcraft.weights.parts import merge_lora, part_weights
from fastcraft.weights.report import ExportError, ExportReport, compared, write_readme
from fastcraft.weights.tokenizer_files import write_tokenizer
from fastcraft.weights.verify import Reference, distance, outputs, same, tolerance

__all__ = ["DTYPES", "ExportError", "ExportReport", "export_lora", "export_text_encoder", "export_unet"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_OF_THIS_MACHINE = ("_name_or_path", "_use_default_values", "_ignore_files", "_pre_quantization_dtype")


def export_text_encoder(
    model: Any,
    tokenizer_source: Path,
    out: Path,
    *,
    reference_ids: Tensor,
    dtype: str = "float32",
    part: str = "text",
) -> ExportReport:
    """Write ``out/text_encoder`` and ``out/tokenizer`` (``_2`` each for "text_2"), complete or not at all.

    Args:
        model: a transformers CLIPTextModel, with projection or without; adapters in it are merged.
        tokenizer_source: the base model's tokenizer folder.
        out: the run's ``export`` folder.
        reference_ids: ``(B, L)`` token ids for the comparison.
        dtype: of the weights in the file: float32, float16 or bfloat16.
        part: "text" or "text_2".

    Raises:
        ExportError: the reloaded weights are not those written, or float32 embeddings differ.
        UserError: the tokenizer folder holds no vocabulary.
    """
    folder = part_names(part).folder

    def write(place: Path) -> ExportReport:
        state, exact = _merged(model, dtype, out / folder)
        write_tensors(place / "model.safetensors", to_prefixed(state), metadata={"format": "pt"})
        write_json(place / "config.json", _text_config(model, dtype))
        reloaded = _reload_text(model, place)
        return _check(model, reloaded, state, dtype, path=out / folder, reference=reference_ids, exact=exact)

    report = write_folder(out / folder, write)
    tokenizer = out / folder.replace("text_encoder", "tokenizer")
    write_folder(tokenizer, lambda place: write_tokenizer(tokenizer_source, place))
    write_readme(out)
    return report


def export_unet(
    unet: Any,
    out: Path,
    *,
    reference_call: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    dtype: str = "float32",
) -> ExportReport:
    """Write ``out/unet``, a diffusers folder, complete or not at all; adapters are merged.

    Args:
        unet: a diffusers UNet2DConditionModel, with any attention processors.
        out: the run's ``export`` folder.
        reference_call: arguments of one call for the comparison, by name: ``sample``, ``timestep``,
            ``encoder_hidden_states``, for SDXL also ``added_cond_kwargs``.
        config: what ``config.json`` is to say; the UNet's own by default.
        dtype: of the weights in the file: float32, float16 or bfloat16.

    Raises:
        ExportError: the reloaded weights are not those written, or predictions differ by more than rounding.
    """

    def write(place: Path) -> ExportReport:
        state, _ = _merged(unet, dtype, out / "unet")
        write_tensors(place / "diffusion_pytorch_model.safetensors", state, metadata={"format": "pt"})
        write_json(place / "config.json", _unet_config(unet, config or unet.config))
        reloaded = _reload_unet(unet, place)
        return _check(unet, reloaded, state, dtype, path=out / "unet", reference=reference_call, exact=False)

    report = write_folder(out / "unet", write)
    write_readme(out)
    return report


def _merged(model: Any, dtype: str, path: Path) -> tuple[dict[str, Tensor], bool]:
    """Weights to write, and whether the model must compute the same with them to the bit."""
    weights = part_weights(model)
    state = weights.whole or {}
    if weights.lora:
        state = merge_lora(state, weights.lora, weights.scaling)
    state = {name: tensor.to(DTYPES[dtype]).contiguous() for name, tensor in state.items()}
    if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
        raise ExportError(f"{path}: weights are not finite in {dtype}")
    return state, dtype == "float32" and not weights.lora  # merging and rounding change the last bits


def _check(
    model: Any, reloaded: Any, state: Mapping[str, Tensor], dtype: str, *, path: Path, reference: Reference, exact: bool
) -> ExportReport:
    """Compare the reloaded float32 model with what was written, and in the trained model's dtype with that model."""
    what = compared(["unet"] if isinstance(reference, Mapping) else ["text"])
    if not same(to_flat(reloaded.state_dict()), {name: tensor.float() for name, tensor in state.items()}):
        raise ExportError(f"{path}: the reloaded weights are not those that were written")
    parameter = next(model.parameters())
    expected = outputs(model, reference)
    nn.Module.to(reloaded, parameter.device, parameter.dtype)  # diffusers' own `to` warns about nothing here
    error = distance(outputs(reloaded, reference), expected)
    if not error <= (0.0 if exact else tolerance(expected, DTYPES[dtype], parameter.dtype)):
        raise ExportError(f"{path}: {what} differ by {error:.2e} after reloading")
    return ExportReport(path=path, num_tensors=len(state), max_abs_error=error, what=what)


def _text_config(model: Any, dtype: str) -> dict[str, Any]:
    """The encoder's config for any transformers version, without paths of this machine."""
    config = _portable(model.config.to_dict()) | {"architectures": [type(model).__name__], "torch_dtype": dtype}
    config.pop("dtype", None)
    return config


def _unet_config(unet: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    version = importlib.metadata.version("diffusers")
    return _portable(config) | {"_class_name": type(unet).__name__, "_diffusers_version": version}


def _portable(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in config.items()
        if name not in _OF_THIS_MACHINE and not (isinstance(value, str) and os.path.isabs(value))
    }


def _reload_text(model: Any, folder: Path) -> Any:
    """The exported folder through transformers, float32."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        reloaded, info = type(model).from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            attn_implementation=model.config._attn_implementation,
        )
    finally:
        if bars:
            logging.enable_progress_bar()
    return _complete(reloaded, info, folder)


def _reload_unet(unet: Any, folder: Path) -> Any:
    """The exported folder through diffusers, float32."""
    reloaded, info = type(unet).from_pretrained(
        folder, torch_dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    return _complete(reloaded, info, folder)


def _complete(reloaded: Any, info: Mapping[str, Any], folder: Path) -> Any:
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ExportError(f"{folder}: missing {info['missing_keys']}, unexpected {info['unexpected_keys']}")
    return reloaded
