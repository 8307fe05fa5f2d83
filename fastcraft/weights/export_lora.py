"""The adapters of all trained parts in the two variants that reload everywhere, each verified by reading it back."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastcraft.durable import write_folder, write_tensors
from fastcraft.errors import UserError
from fastcraft.weights.keymap import part_names
from fastcraft.weights.lora_diffusers import to_diffusers
from fastcraft.weights.lora_kohya import kohya_metadata, to_kohya
from fastcraft.weights.parts import PartWeights, apply_weights, part_weights
from fastcraft.weights.readers import LORA_FILE, read_weights
from fastcraft.weights.report import ExportError, ExportReport, compared, write_readme
from fastcraft.weights.verify import Reference, distance, fresh_copy, outputs, same, tolerance

KOHYA_FILE = "kohya.safetensors"


def export_lora(
    parts: Mapping[str, Any] | nn.Module,
    out: Path,
    *,
    reference_ids: Tensor | None = None,
    reference_call: Mapping[str, Any] | None = None,
    base_model_version: str | None = None,
    title: str = "fastcraft",
    resolution: int = 512,
) -> list[ExportReport]:
    """Write ``out/lora``, both variants or nothing.

    ``pytorch_lora_weights.safetensors`` has diffusers' names and the scale multiplied into B; ``kohya.safetensors`` has
    kohya's names, alpha and the metadata its readers show. Each is read back, merged into a fresh copy of every part's
    base and compared.

    Args:
        parts: "text", "text_2", "unet" -> the model with its adapters; a model alone is the first text encoder.
        out: the run's ``export`` folder.
        reference_ids: ``(B, L)`` token ids, for text encoders.
        reference_call: arguments of one call, for a UNet (see `export_unet`).
        base_model_version: "sd_v1", "sd_v2" or "sdxl_base_v1-0"; by default found out from the parts, where an SDXL
            whose first text encoder alone has adapters looks like "sd_v1".
        title: a name for the metadata.
        resolution: of the pictures, for the metadata.

    Returns:
        A report for each file, with the largest difference of all parts.

    Raises:
        ExportError: a variant does not read back as the adapters that were trained.
        UserError: a part without adapters, or with other ones than plain LoRA.
        ValueError: the reference of a part is not given.
    """
    models = {"text": parts} if isinstance(parts, nn.Module) else parts
    if not models:
        raise ValueError("export_lora: there are no parts")
    references = {part: _reference(part, reference_ids, reference_call) for part in models}
    version = base_model_version or _base_model_version(models)
    trained = {part: _Trained.of(model, references[part]) for part, model in models.items()}
    variants = {
        LORA_FILE: (_diffusers(trained), {"format": "pt"}),
        KOHYA_FILE: (_kohya(trained, version), _metadata(trained, version, title, resolution)),
    }
    reports = write_folder(out / "lora", lambda folder: _write(folder, out / "lora", variants, trained))
    write_readme(out)
    return reports


@dataclass(frozen=True, kw_only=True, slots=True)
class _Trained:
    """A part with its adapters, and what it computes."""

    model: Any
    weights: PartWeights
    reference: Reference
    expected: list[Tensor]

    @classmethod
    def of(cls, model: Any, reference: Reference) -> "_Trained":
        return cls(model=model, weights=part_weights(model), reference=reference, expected=outputs(model, reference))


Variants = Mapping[str, tuple[dict[str, Tensor], dict[str, str]]]
"""Name of a file -> tensors and metadata."""


def _write(folder: Path, final: Path, variants: Variants, trained: Mapping[str, _Trained]) -> list[ExportReport]:
    reports = []
    for name, (state, notes) in variants.items():
        write_tensors(folder / name, {key: tensor.contiguous() for key, tensor in state.items()}, metadata=notes)
        error = max(_read_back(folder / name, final / name, part, adapter) for part, adapter in trained.items())
        what = compared([*trained])
        reports.append(ExportReport(path=final / name, num_tensors=len(state), max_abs_error=error, what=what))
    return reports


def _reference(part: str, ids: Tensor | None, call: Mapping[str, Any] | None) -> Reference:
    unet = part_names(part).folder == "unet"
    reference: Reference | None = call if unet else ids
    if reference is None:
        raise ValueError(f"export_lora: {'reference_call' if unet else 'reference_ids'} is needed for {part!r}")
    return reference


def _diffusers(trained: Mapping[str, _Trained]) -> dict[str, Tensor]:
    return {
        name: tensor
        for part, adapter in trained.items()
        for name, tensor in to_diffusers(part, adapter.weights.lora or {}, adapter.weights.scaling).items()
    }


def _kohya(trained: Mapping[str, _Trained], version: str) -> dict[str, Tensor]:
    two = version.startswith("sdxl")
    return {
        name: tensor
        for part, adapter in trained.items()
        for name, tensor in to_kohya(
            part, adapter.weights.lora or {}, adapter.weights.scaling, two_encoders=two
        ).items()
    }


def _metadata(trained: Mapping[str, _Trained], version: str, title: str, resolution: int) -> dict[str, str]:
    sizes = [
        (len(adapter.weights.lora[f"{module}.lora_A.weight"]), scaling)
        for adapter in trained.values()
        if adapter.weights.lora
        for module, scaling in adapter.weights.scaling.items()
    ]
    return kohya_metadata(
        [rank for rank, _ in sizes], [rank * scaling for rank, scaling in sizes],
        base_model_version=version, title=title, resolution=resolution,
    )  # fmt: skip


def _read_back(file: Path, path: Path, part: str, trained: _Trained) -> float:
    """The largest difference that the file's adapters make on a fresh copy of the base; ``path`` is for messages."""
    try:
        read = read_weights(file, part, [name for name, _ in trained.model.named_modules()])
    except UserError as error:
        raise ExportError(f"{path}: does not read back: {error}") from error
    if not _same_adapters(read, trained.weights):
        raise ExportError(f"{path}: the adapters of {part!r} are not those that were trained")
    fresh = fresh_copy(trained.model, trained.weights.whole or {})
    apply_weights(fresh, read)
    largest = distance(outputs(fresh, trained.reference), trained.expected)
    if not largest <= tolerance(trained.expected, next(trained.model.parameters()).dtype):
        raise ExportError(f"{path}: {compared([part])} differ by {largest:.2e} after reloading")
    return largest


def _same_adapters(read: PartWeights, trained: PartWeights) -> bool:
    """Equal to the bit, B times what its scaling lacks."""
    if not read.lora or not trained.lora or read.scaling.keys() != trained.scaling.keys():
        return False
    wanted = dict(trained.lora)
    for module, scaling in trained.scaling.items():
        if math.isclose(read.scaling[module], scaling, rel_tol=1e-6):
            continue
        if read.scaling[module] != 1.0:
            return False
        wanted[f"{module}.lora_B.weight"] = wanted[f"{module}.lora_B.weight"] * scaling
    return same(read.lora, wanted)


def _base_model_version(models: Mapping[str, Any]) -> str:
    """Kohya's name of the model that the parts belong to."""
    unet, text = models.get("unet"), models.get("text")
    if "text_2" in models or (unet is not None and unet.config.get("addition_embed_type") == "text_time"):
        return "sdxl_base_v1-0"
    width = text.config.hidden_size if text is not None else models["unet"].config.cross_attention_dim
    return "sd_v2" if width == 1024 else "sd_v1"  # OpenCLIP-H; CLIP-L has 768
