"""The last lines of a run: where everything is, and how to use the trained encoder elsewhere."""

import shlex
from pathlib import Path

LORA_FILE = "pytorch_lora_weights.safetensors"


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
        ("encoder", run_dir / "export" if (run_dir / "export").is_dir() else None),
    ]
    lines = ["", *(f"{name + ':':<9}{place}" for name, place in places if place is not None)]
    usage = usage_lines(run_dir / "export", base_model=base_model)
    if usage:
        lines += ["", "Use the encoder in any Stable Diffusion pipeline:", "", *(f"    {line}" for line in usage)]
    else:
        lines += ["", f"No encoder was exported to {run_dir / 'export'}."]
    return "\n".join(lines)


def usage_lines(export_dir: Path, *, base_model: str) -> list[str]:
    """Python that makes a picture with the exported encoder; empty when ``export_dir`` holds none.

    A full encoder is a transformers folder ``text_encoder/``; a LoRA is ``pytorch_lora_weights.safetensors``.
    """
    if (export_dir / "text_encoder" / "config.json").is_file():
        return [
            "from diffusers import StableDiffusionPipeline; from transformers import CLIPTextModel",
            f"encoder = CLIPTextModel.from_pretrained({str(export_dir / 'text_encoder')!r})",
            f"pipeline = StableDiffusionPipeline.from_pretrained({base_model!r}, text_encoder=encoder, "
            "dtype=encoder.dtype)",
        ]
    if (export_dir / LORA_FILE).is_file():
        return [
            "from diffusers import StableDiffusionPipeline",
            f"pipeline = StableDiffusionPipeline.from_pretrained({base_model!r})",
            f"pipeline.load_lora_weights({str(export_dir)!r})",
        ]
    return []
