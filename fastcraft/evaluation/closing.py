"""The last lines of a run: where everything is, and how to use what was trained elsewhere."""

import shlex
from pathlib import Path

from safetensors import safe_open


def closing_lines(run_dir: Path, *, base_model: str, report: Path | None = None) -> str:
    """What a person needs after the last step; only what exists is mentioned.

    Args:
        run_dir: holds ``samples/``, ``tensorboard/`` and ``export/``.
        base_model: folder or hub id of the pipeline that was trained, for the code to copy.
        report: None = ``run_dir/report.html``.
    """
    report = report or run_dir / "report.html"
    events = run_dir / "tensorboard"
    grids = sorted((run_dir / "samples").glob("step-*.png"))
    places = [
        ("report", report if report.exists() else None),
        ("samples", grids[-1] if grids else None),
        ("curves", f"tensorboard --logdir {shlex.quote(str(events))}" if events.is_dir() else None),
        ("export", run_dir / "export" if (run_dir / "export").is_dir() else None),
    ]
    lines = ["", *(f"{name + ':':<9}{place}" for name, place in places if place is not None)]
    usage = usage_lines(run_dir / "export", base_model=base_model)
    if usage:
        lines += ["", "Use what was trained in any Stable Diffusion pipeline:", "", *(f"    {line}" for line in usage)]
    return "\n".join(lines)


def usage_lines(export_dir: Path, *, base_model: str) -> list[str]:
    """Python that loads the base model with every exported part; empty when ``export_dir`` holds none.

    Parts that are trained whole are folders, ``text_encoder/`` and ``unet/``; adapters of all parts are one file in
    ``lora/``. A text encoder with its adapters merged is there besides them, and is then left out.
    """
    lora = export_dir / "lora" / "pytorch_lora_weights.safetensors"
    parts = [("text_encoder", "CLIPTextModel", "transformers"), ("unet", "UNet2DConditionModel", "diffusers")]
    whole = [
        (name, kind, package)
        for name, kind, package in parts
        if (export_dir / name / "config.json").is_file() and not _has_adapters_of(lora, name)
    ]
    if not whole and not lora.is_file():
        return []
    lines = ["from diffusers import StableDiffusionPipeline"]
    lines += [f"from {package} import {kind}" for _, kind, package in whole]
    lines += [f"{name} = {kind}.from_pretrained({str(export_dir / name)!r})" for name, kind, _ in whole]
    options = "".join(f", {name}={name}" for name, _, _ in whole)
    dtype = f", dtype={whole[0][0]}.dtype" if whole else ""
    lines.append(f"pipeline = StableDiffusionPipeline.from_pretrained({base_model!r}{options}{dtype})")
    if lora.is_file():
        lines.append(f"pipeline.load_lora_weights({str(lora.parent)!r})")
    return lines


def _has_adapters_of(lora: Path, name: str) -> bool:
    if not lora.is_file():
        return False
    with safe_open(lora, framework="pt") as file:
        return any(key.startswith(f"{name}.") for key in file.keys())  # noqa: SIM118  it is no mapping
