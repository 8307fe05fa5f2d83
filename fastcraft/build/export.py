"""What a finished run leaves for other programs: every trained part in the formats that they read, verified."""

from pathlib import Path

from fastcraft.build.run import Parts
from fastcraft.recipe import Recipe
from fastcraft.text.tokenize import tokenize
from fastcraft.weights.export import ExportReport, export_text_encoder


def export_run(recipe: Recipe, parts: Parts, out: Path, *, title: str) -> list[ExportReport]:
    """Write every trained part below ``out``."""
    model = parts.model
    prompts = parts.prompts.evaluation[: recipe.evaluate.num_samples]
    ids = tokenize(model.components.tokenizer, prompts).input_ids[:, 0]
    text = model.trained.parts["text"]
    reports = []
    if text.mode != "frozen":
        encoder = text.module.model
        reports.append(export_text_encoder(encoder, model.components.folder / "tokenizer", out, reference_ids=ids))
    return reports
