"""Exports that other programs load, each verified by loading it again and comparing embeddings."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastcraft.durable import write_folder, write_json, write_tensors, write_text
from fastcraft.weights.keymap import (
    for_module,
    lora_from_diffusers,
    lora_from_kohya,
    lora_modules,
    lora_scale,
    lora_to_diffusers,
    lora_to_kohya,
    merge_lora,
    split_lora,
    to_prefixed,
)
from fastcraft.weights.tokenizer_files import write_tokenizer

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_README = """\
- diffusers: `StableDiffusionPipeline.from_pretrained(BASE, text_encoder=CLIPTextModel.from_pretrained("text_encoder"))`
- diffusers, LoRA (if there is a `lora` folder): `pipe.load_lora_weights("lora")`
- ComfyUI: `text_encoder/model.safetensors` in CLIPLoader; A1111 and ComfyUI, LoRA: `lora/kohya.safetensors`
"""


class ExportError(RuntimeError):
    """What was written does not read back as the model that was trained; nothing was put in place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """One export, after it was read back.

    ``max_abs_error`` compares last hidden states of the reloaded export with the trained model's on the reference
    ids; ``exact`` means equal to the last bit.
    """

    path: Path
    num_tensors: int
    max_abs_error: float

    @property
    def exact(self) -> bool:
        return self.max_abs_error == 0.0

    def __str__(self) -> str:
        agreement = "embeddings bit-exact" if self.exact else f"embeddings within {self.max_abs_error:.1e}"
        return f"{self.path}: {self.num_tensors} tensors, reloaded, {agreement}"


def export_text_encoder(
    model: Any, tokenizer_source: Path, out: Path, *, reference_ids: Tensor, dtype: str = "float32"
) -> ExportReport:
    """Write ``out/text_encoder`` and ``out/tokenizer``, complete or not at all.

    Args:
        model: a transformers CLIPTextModel; PEFT adapters in it are merged into the exported weights.
        tokenizer_source: the base model's tokenizer folder.
        out: the run's ``export`` folder.
        reference_ids: ``(B, L)`` token ids for the comparison.
        dtype: of the weights in the file: float32, float16 or bfloat16.

    Raises:
        ExportError: the reloaded weights are not those written, or float32 embeddings differ.
        UserError: the tokenizer folder holds no vocabulary.
    """
    base, lora = split_lora(_cpu_state(model))
    if lora:
        base = merge_lora(base, lora, scale=lora_scale(model)[1])
    state = {name: tensor.to(DTYPES[dtype]).contiguous() for name, tensor in to_prefixed(base).items()}
    if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
        raise ExportError(f"{out / 'text_encoder'}: weights are not finite in {dtype}")
    expected = _embed(model, reference_ids)

    def write(folder: Path) -> ExportReport:
        write_tensors(folder / "model.safetensors", state, metadata={"format": "pt"})
        write_json(folder / "config.json", _config(model, dtype))
        reloaded = _reload(model, folder)
        if not _same(to_prefixed(_cpu_state(reloaded)), {name: tensor.float() for name, tensor in state.items()}):
            raise ExportError(f"{out / 'text_encoder'}: the reloaded weights are not those that were written")
        error = _distance(_embed(reloaded, reference_ids), expected)
        exact = dtype == "float32" and not lora  # merging and rounding change the last bits
        if error > (0.0 if exact else _tolerance(expected, DTYPES[dtype])):
            raise ExportError(f"{out / 'text_encoder'}: embeddings differ by {error:.2e} after reloading")
        return ExportReport(path=out / "text_encoder", num_tensors=len(state), max_abs_error=error)

    report = write_folder(out / "text_encoder", write)
    write_folder(out / "tokenizer", lambda folder: write_tokenizer(tokenizer_source, folder))
    write_text(out / "README.md", _README)
    return report


def export_lora(
    model: Any, out: Path, *, reference_ids: Tensor, title: str = "fastcraft", resolution: int = 512
) -> list[ExportReport]:
    """Write ``out/lora`` in the two variants that reload exactly everywhere.

    ``pytorch_lora_weights.safetensors`` has diffusers' names and alpha / rank multiplied into B;
    ``kohya.safetensors`` has kohya's names, alpha and the metadata its readers show. Each is read back, put on a fresh
    copy of the base encoder and compared with ``model`` on ``reference_ids`` ``(B, L)``.

    Raises:
        ExportError: a variant does not read back as the adapters that were trained.
        UserError: the model has no adapters, or other ones than plain LoRA of one rank.
    """
    base, lora = split_lora(_cpu_state(model))
    rank, scale = lora_scale(model)
    alpha = scale * rank
    expected = _embed(model, reference_ids)

    def write(folder: Path) -> list[ExportReport]:
        diffusers, kohya = folder / "pytorch_lora_weights.safetensors", folder / "kohya.safetensors"
        write_tensors(diffusers, _contiguous(lora_to_diffusers(lora, scale=scale)), metadata={"format": "pt"})
        metadata = _kohya_metadata(model, rank=rank, alpha=alpha, title=title, resolution=resolution)
        write_tensors(kohya, _contiguous(lora_to_kohya(lora, alpha=alpha)), metadata=metadata)
        baked = {name: tensor * scale if ".lora_B." in name else tensor for name, tensor in lora.items()}
        reports = []
        for file, wanted, (read, read_alpha) in (
            (diffusers, baked, (lora_from_diffusers(load_file(diffusers)), float(rank))),
            (kohya, lora, lora_from_kohya(load_file(kohya))),
        ):
            fresh = _with_lora(model, base, read, rank=rank, alpha=read_alpha)
            error = _distance(_embed(fresh, reference_ids), expected)
            if not _same(read, wanted) or error > _tolerance(expected, torch.float32):
                raise ExportError(f"{out / 'lora' / file.name}: embeddings differ by {error:.2e} after reloading")
            num_tensors = len(load_file(file))
            reports.append(ExportReport(path=out / "lora" / file.name, num_tensors=num_tensors, max_abs_error=error))
        return reports

    reports = write_folder(out / "lora", write)
    write_text(out / "README.md", _README)
    return reports


def _cpu_state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


def _contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _same(read: Mapping[str, Tensor], written: Mapping[str, Tensor]) -> bool:
    return read.keys() == written.keys() and all(torch.equal(read[name], written[name]) for name in read)


@torch.no_grad()
def _embed(model: Any, reference_ids: Tensor) -> Tensor:
    """Last hidden states ``(B, L, D)`` on the CPU, without dropout."""
    training = model.training
    model.eval()
    embeds = model(reference_ids.to(next(model.parameters()).device)).last_hidden_state
    model.train(training)
    return embeds.float().cpu()


def _distance(embeds: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; infinite where either is not a number."""
    distance = float((embeds - expected).abs().max())
    return distance if distance == distance else float("inf")


def _tolerance(expected: Tensor, dtype: torch.dtype) -> float:
    """Rounding that a chain of layers may add: 64 units in the last place of the largest value."""
    return 64 * torch.finfo(dtype).eps * float(expected.abs().max())


def _config(model: Any, dtype: str) -> dict[str, Any]:
    """The encoder's config for any transformers version, without paths of this machine."""
    config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    config |= {"architectures": [type(model).__name__], "torch_dtype": dtype}
    config.pop("dtype", None)
    return {name: value for name, value in config.items() if not (isinstance(value, str) and os.path.isabs(value))}


def _reload(model: Any, folder: Path) -> Any:
    """The exported folder through transformers, on the model's device, float32."""
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
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ExportError(f"{folder}: missing {info['missing_keys']}, unexpected {info['unexpected_keys']}")
    return reloaded.to(next(model.parameters()).device)


def _with_lora(model: Any, base: Mapping[str, Tensor], lora: Mapping[str, Tensor], *, rank: int, alpha: float) -> Any:
    """A fresh encoder with the base's weights and the adapters read from a file."""
    from peft import LoraConfig, inject_adapter_in_model

    fresh = type(model)(model.config)
    fresh.load_state_dict(for_module(base, fresh), strict=True)
    names = {name for name, _ in fresh.named_modules()}
    modules = [name for module in lora_modules(lora) for name in (module, f"text_model.{module}") if name in names]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules), fresh)  # type: ignore[arg-type]
    named = {name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."): tensor
             for name, tensor in for_module(lora, fresh).items()}  # fmt: skip
    missing, unexpected = fresh.load_state_dict(named, strict=False)
    if unexpected or any("lora_" in name for name in missing):
        raise ExportError(f"adapters do not fit: unexpected {unexpected}, missing {missing}")
    return fresh.to(next(model.parameters()).device)


def _kohya_metadata(model: Any, *, rank: int, alpha: float, title: str, resolution: int) -> dict[str, str]:
    """What kohya's tools and the SAI model specification 1.0.1 ask for; nothing about this machine."""
    second = model.config.hidden_size == 1024  # SD2's OpenCLIP-H; SD1's CLIP-L has 768
    return {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_base_model_version": "sd_v2" if second else "sd_v1",
        "ss_output_name": title,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{'stable-diffusion-v2-768-v' if second else 'stable-diffusion-v1'}/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.resolution": f"{resolution}x{resolution}",
    }
