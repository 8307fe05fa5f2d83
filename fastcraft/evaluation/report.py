"""The report of a run: one HTML file with curves, pictures and tables that needs nothing but itself.

``python -m fastcraft.evaluation.report RUN_DIR`` makes it again from the files of the run.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastcraft.durable import write_json, write_text
from fastcraft.errors import UserError
from fastcraft.evaluation.images import sample_files, sample_steps
from fastcraft.evaluation.page import Pair, ReportData, render_page
from fastcraft.evaluation.record import finite, read_evaluations, read_metrics

REPORT = "report.html"
INPUTS = "report.json"
STRIP_STEPS = 6
STRIP_PROMPTS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportInputs:
    """What a report says besides the metrics and the pictures, as ``report.json`` keeps it."""

    title: str
    recipe_text: str
    prompts: list[str]
    exam_before: dict[str, float | None] | None = None
    exam_after: dict[str, float | None] | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    command: str = ""
    before_step: int = 0
    after_step: int = 0


def write_report(
    run_dir: Path,
    *,
    title: str,
    recipe_text: str,
    prompts: Sequence[str],
    exam_before: Mapping[str, float] | None,
    exam_after: Mapping[str, float] | None,
    environment: Mapping[str, Any],
    notes: Sequence[str],
    command: str = "",
    before_step: int = 0,
    after_step: int | None = None,
) -> Path:
    """Store what the report needs besides metrics and samples in the run directory, then write ``report.html`` there.

    Args:
        prompts: B texts, untrusted.
        exam_before, exam_after: tables of `evaluate_pictures`, or None.
        command: the line that started the run.
        after_step: None = the last step in metrics.jsonl, or ``before_step`` + 1 without any.

    Returns:
        The report's path.
    """
    metrics = read_metrics(run_dir)
    if after_step is None:
        after_step = metrics[-1]["step"] if metrics else before_step + 1
    inputs = ReportInputs(
        title=title,
        recipe_text=recipe_text,
        prompts=list(prompts),
        exam_before=finite(exam_before),
        exam_after=finite(exam_after),
        environment=finite(environment),
        notes=list(notes),
        command=command,
        before_step=before_step,
        after_step=after_step,
    )
    write_json(run_dir / INPUTS, dataclasses.asdict(inputs))
    return rebuild_report(run_dir)


def rebuild_report(run_dir: Path) -> Path:
    """Write ``report.html`` from the files of a run, finished or not.

    Raises:
        UserError: there is no such directory, or nothing in it to report.
    """
    if not run_dir.is_dir():
        raise UserError(f"RUN_DIR must be a directory of a run, got {str(run_dir)!r}")
    metrics = read_metrics(run_dir)
    if not metrics and not sample_steps(run_dir):
        raise UserError(f"RUN_DIR must hold metrics.jsonl or samples/, got {str(run_dir)!r}")
    inputs = _stored_inputs(run_dir) or _inputs_of_unfinished(run_dir, metrics)
    steps = [step for step in sample_steps(run_dir) if inputs.before_step <= step <= inputs.after_step]
    data = ReportData(
        title=inputs.title,
        recipe_text=inputs.recipe_text,
        exam_before=inputs.exam_before,
        exam_after=inputs.exam_after,
        environment=inputs.environment,
        notes=[*inputs.notes, *_went_on(metrics, inputs.after_step)],
        command=inputs.command,
        metrics=metrics,
        evaluations=read_evaluations(run_dir),
        pairs=_pairs(run_dir, inputs),
        strips=_strips(run_dir, inputs.prompts, steps),
        before_step=inputs.before_step,
        after_step=inputs.after_step,
    )
    return write_text(run_dir / REPORT, render_page(data))


def _pairs(run_dir: Path, inputs: ReportInputs) -> list[Pair]:
    """Pictures of the same prompt; where one side is missing the other stands alone."""
    before = dict(enumerate(sample_files(run_dir, inputs.before_step)))
    after = dict(enumerate(sample_files(run_dir, inputs.after_step))) if inputs.after_step > inputs.before_step else {}
    prompts = enumerate(inputs.prompts)
    return [(p, before.get(i), after.get(i)) for i, p in prompts if i in before or i in after]


def _strips(run_dir: Path, prompts: Sequence[str], steps: Sequence[int]) -> list[tuple[str, list[tuple[int, Path]]]]:
    """The first prompts over up to six steps, evenly chosen; empty below three steps, as the pairs show two."""
    if len(steps) < 3:
        return []
    count = min(STRIP_STEPS, len(steps))
    chosen = [steps[round(index * (len(steps) - 1) / (count - 1))] for index in range(count)]
    files = {step: sample_files(run_dir, step) for step in chosen}
    return [
        (prompt, [(step, files[step][index]) for step in chosen if index < len(files[step])])
        for index, prompt in enumerate(prompts[:STRIP_PROMPTS])
    ]


def _went_on(metrics: Sequence[Mapping[str, Any]], after_step: int) -> list[str]:
    """A note for a run that was resumed after its report and stopped before the next one."""
    last = metrics[-1]["step"] if metrics else 0
    if last <= after_step:
        return []
    return [f"The pictures and the table are of step {after_step}; the curves go on to step {last}."]


def _stored_inputs(run_dir: Path) -> ReportInputs | None:
    path = run_dir / INPUTS
    if not path.exists():
        return None
    try:
        return ReportInputs(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{INPUTS} is damaged ({error}); delete it to rebuild from the other files") from error


def _inputs_of_unfinished(run_dir: Path, metrics: Sequence[Mapping[str, Any]]) -> ReportInputs:
    """For a run that was stopped before it wrote its report: the first and the newest of everything."""
    evaluations = read_evaluations(run_dir)
    last = metrics[-1]["step"] if metrics else None
    steps = [step for step in sample_steps(run_dir) if last is None or step <= last]
    before_step, after_step = (steps[0], steps[-1]) if steps else (0, last or 0)
    return ReportInputs(
        title=run_dir.resolve().name,
        recipe_text=_text(run_dir / "recipe.toml"),
        prompts=json.loads(_text(run_dir / "samples" / "prompts.json") or "[]"),
        exam_before=evaluations[0]["evaluation"] if evaluations else None,
        exam_after=evaluations[-1]["evaluation"] if len(evaluations) > 1 else None,
        environment=json.loads(_text(run_dir / "environment.json") or "{}"),
        notes=[f"Made from the files of a run that has not finished; its last recorded step is {last or 0}."],
        before_step=before_step,
        after_step=after_step,
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m fastcraft.evaluation.report RUN_DIR``: 0, or 2 with one line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m fastcraft.evaluation.report", description=rebuild_report.__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="directory that fastcraft/train.py filled")
    try:
        print(rebuild_report(parser.parse_args(arguments).run_dir))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
