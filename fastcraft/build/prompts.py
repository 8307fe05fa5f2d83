"""The prompts of a recipe: those that are trained on, and those that evaluations sample."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcraft.data.prompts import load_prompts
from fastcraft.errors import UserError
from fastcraft.recipe import Recipe
from fastcraft.shapes import FOLDER
from fastcraft.text.tokenize import tokenize

MAX_COUNTED = 100_000


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """``training`` in the file's order, ``evaluation`` as many as an evaluation needs; ``summary`` for a person."""

    training: Sequence[str]
    evaluation: list[str]
    summary: str


def build_prompts(recipe: Recipe) -> Prompts:
    """Read the prompt files.

    Raises:
        UserError: no prompt file, or one that cannot be read.
    """
    if not recipe.prompts.path:
        raise UserError("prompts.path: a prompt file is required (--prompts FILE), got ''")
    source = load_prompts(
        prompt_file(recipe.prompts.path), column=recipe.prompts.column, max_characters=recipe.prompts.max_characters
    )
    chosen: Sequence[str] = source.prompts
    if recipe.evaluate.prompts:
        chosen = load_prompts(prompt_file(recipe.evaluate.prompts), column=recipe.prompts.column).prompts
    wanted = max(recipe.evaluate.num_samples, recipe.evaluate.exam_num_samples)
    evaluation = [chosen[index] for index in range(min(wanted, len(chosen)))]
    return Prompts(training=source.prompts, evaluation=evaluation, summary=source.summary())


def prompt_file(path: str) -> Path:
    """A prompt file; ``shapes`` and ``shapes:NAME`` are those of the bundled miniature world.

    Raises:
        UserError: no bundled file of that name.
    """
    name, _, which = path.partition(":")
    if name != "shapes":
        return Path(path)
    file = FOLDER / "prompts" / f"{which or 'train'}.txt"
    if not file.is_file():
        known = ", ".join(f"shapes:{other.stem}" for other in sorted(file.parent.glob("*.txt")))
        raise UserError(f"prompts.path: unknown bundled prompts {path!r}; known: {known}")
    return file


def count_truncated(tokenizer: Any, prompts: Sequence[str]) -> str:
    """A note on prompts that lose tokens at the encoder's length; of a large file its first prompts are looked at."""
    looked_at = min(len(prompts), MAX_COUNTED)
    num_truncated = sum(
        tokenize(tokenizer, [prompts[i] for i in range(first, min(first + 1000, looked_at))]).num_truncated
        for first in range(0, looked_at, 1000)
    )
    if not num_truncated:
        return ""
    among = "" if looked_at == len(prompts) else f" among the first {looked_at}"
    return f"; {num_truncated} cut at {tokenizer.model_max_length} tokens{among}"
