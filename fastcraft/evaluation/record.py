"""What a run writes down while it goes: metrics.jsonl, evaluations.jsonl, TensorBoard events and the progress bar."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from fastcraft.durable import write_text
from fastcraft.errors import UserError
from fastcraft.evaluation.images import plain, save_samples
from fastcraft.evaluation.progress import Progress

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
METRIC_KEYS = (
    "step", "loss", "rewards", "grad_norm", "lr", "samples_per_sec_per_gpu", "step_time_s", "peak_memory_mib",
)  # fmt: skip
"""Present in every line of metrics.jsonl; a figure that is not finite or not known is null."""


class RunRecord:
    """The record of one run, on rank 0.

    Args:
        run_dir: made if it does not exist.
        num_steps: optimiser steps of the whole run.
        total_samples_per_step: pictures that one optimiser step sees over all ranks and micro-steps.
        resume_step: None = a new run; else the step of the checkpoint that is continued: lines of later steps are
            dropped from both files and hidden from TensorBoard, and a line cut short by a kill goes with them.

    Raises:
        UserError: a new run in a directory that already holds metrics.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        num_steps: int,
        total_samples_per_step: int,
        resume_step: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run_dir = run_dir
        self.total_samples_per_step = total_samples_per_step
        run_dir.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, EVALUATIONS):
            path = run_dir / name
            if resume_step is not None:
                _truncate(path, resume_step)
            elif path.exists() and path.stat().st_size:
                raise UserError(
                    f"--run-dir: {str(run_dir)!r} already holds {name}; resume it or name another directory"
                )
        self._last_step = resume_step or 0
        past = read_metrics(run_dir)
        self._num_samples_seen = past[-1].get("num_samples_seen", 0) if past else 0
        self._metrics = (run_dir / METRICS).open("a", encoding="ascii")
        self._evaluations = (run_dir / EVALUATIONS).open("a", encoding="ascii")
        purge_step = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step, flush_secs=10)
        self.progress = progress or Progress(num_steps, first_step=self._last_step)

    def log_step(self, entry: Mapping[str, Any]) -> None:
        """Write one optimiser step.

        Args:
            entry: the `METRIC_KEYS` and any further key. ``rewards`` is {name: mean}, with the weighted sum under
                ``total``. Numbers may be tensors of one element; NaN and Inf are written as null. ``num_samples_seen``
                is added.

        Raises:
            ValueError: a key is missing, a value is no JSON, or the step does not come after the last one.
        """
        missing = [key for key in METRIC_KEYS if key not in entry]
        if missing:
            raise ValueError(f"log_step: entry must have {', '.join(METRIC_KEYS)}; missing: {', '.join(missing)}")
        line = finite(entry)
        step = line["step"]
        if not isinstance(step, int) or step <= self._last_step:
            raise ValueError(f"log_step: step must be an integer above the last one ({self._last_step}), got {step!r}")
        self._num_samples_seen += self.total_samples_per_step
        line["num_samples_seen"] = self._num_samples_seen
        self._last_step = step
        _append(self._metrics, line)
        self._scalars({key: value for key, value in line.items() if key != "step"}, step, "train")
        self.progress.update(line)

    def log_evaluation(self, step: int, evaluation: Mapping[str, Any]) -> None:
        """Append ``{"step": step, "evaluation": {...}}`` to evaluations.jsonl and to TensorBoard."""
        line = {"step": step, "evaluation": finite(evaluation)}
        _append(self._evaluations, line)
        self._scalars(line["evaluation"], step, "evaluation")

    def log_samples(self, step: int, images: Tensor, prompts: Sequence[str]) -> Path:
        """Save (B, 3, H, W) pictures in [0, 1] as `save_samples` does, and show the grid in TensorBoard.

        Returns:
            The grid's path.
        """
        grid = save_samples(images, self.run_dir, step=step, prompts=prompts)
        self._writer.add_image("samples", _pixels(grid), step, dataformats="HWC")
        return grid

    def message(self, text: str) -> None:
        """A line for the person watching, above the bar."""
        self.progress.message(text)

    def _scalars(self, figures: Mapping[str, Any], step: int, group: str) -> None:
        for name, value in figures.items():
            if isinstance(value, dict):
                self._scalars(value, step, name)
            elif isinstance(value, int | float):
                self._writer.add_scalar(plain(f"{group}/{name}"), value, step)

    def close(self) -> None:
        """Flush everything; the record takes no more steps."""
        self.progress.close()
        self._metrics.close()
        self._evaluations.close()
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def finite(value: Any) -> Any:
    """``value`` as JSON takes it: tensors of one element become numbers, NaN and Inf become None.

    Raises:
        ValueError: something that is no number, text, bool, None, list or mapping with text keys.
    """
    if isinstance(value, Mapping):
        return {_key(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if value is None or isinstance(value, bool | str):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()  # a tensor or a numpy number
    if isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    raise ValueError(f"a recorded value must be a number, text, list or mapping, got {type(value).__name__}")


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise ValueError(f"a recorded name must be text, got {key!r}")
    return key


def _append(file: Any, line: Mapping[str, Any]) -> None:
    file.write(json.dumps(line, allow_nan=False) + "\n")
    file.flush()


def _pixels(path: Path) -> Any:
    """(H, W, 3) numpy uint8."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def _truncate(path: Path, last_step: int) -> None:
    """Keep the lines up to and including ``last_step``."""
    if path.exists():
        kept = [line for line in _read_lines(path) if line["step"] <= last_step]
        write_text(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in kept))


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Every complete line of metrics.jsonl, in order; a last line cut short by a kill is left out; no file, no lines.

    Raises:
        UserError: a line before the last is no JSON object with a step.
    """
    return _read_lines(run_dir / METRICS)


def read_evaluations(run_dir: Path) -> list[dict[str, Any]]:
    """The newest complete line of each step in evaluations.jsonl, ``{"step": ..., "evaluation": {...}}``, by step."""
    lines = {line["step"]: line for line in _read_lines(run_dir / EVALUATIONS)}
    return [lines[step] for step in sorted(lines)]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
    lines = []
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                raise ValueError("no object with a step")
        except ValueError as error:
            if number == len(texts):  # no newline after it: the run was killed while writing
                break
            raise UserError(f"{path.name} line {number} is damaged: {error}") from error
        lines.append(line)
    return lines
