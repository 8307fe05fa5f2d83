"""Scores of pictures as text, JSON and CSV."""

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreTable:
    """One row for each picture, one column for each reward."""

    files: Sequence[str]
    prompts: Sequence[str]
    scores: Mapping[str, Sequence[float]]
    """By reward, as many as pictures; NaN and Inf are possible."""
    notes: Sequence[Sequence[str]] = ()
    """What was done to each picture before it was scored; nothing = nothing to any."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Pictures that were not scored, which are in no row, and why."""

    def not_finite(self) -> dict[str, list[str]]:
        """By reward, the pictures whose score is NaN or Inf; rewards without any are left out."""
        files_by_name = {
            name: [file for file, value in zip(self.files, values, strict=True) if not math.isfinite(value)]
            for name, values in self.scores.items()
        }
        return {name: files for name, files in files_by_name.items() if files}

    def text(self) -> str:
        """Mean, standard error and extremes of each reward, over the pictures with a finite score."""
        rows = [("reward", "mean", "std error", "lowest", "highest", "pictures")]
        for name, values in self.scores.items():
            finite = {file: value for file, value in zip(self.files, values, strict=True) if math.isfinite(value)}
            if not finite:
                rows.append((name, "-", "-", "-", "-", f"0 of {len(values)}"))
                continue
            error = statistics.stdev(finite.values()) / math.sqrt(len(finite)) if len(finite) > 1 else math.nan
            low, high = min(finite, key=finite.__getitem__), max(finite, key=finite.__getitem__)
            count = str(len(values)) if len(finite) == len(values) else f"{len(finite)} of {len(values)}"
            rows.append(
                (
                    name, f"{statistics.fmean(finite.values()):.4f}", "-" if math.isnan(error) else f"{error:.4f}",
                    f"{finite[low]:.4f} {low}", f"{finite[high]:.4f} {high}", count,
                )
            )  # fmt: skip
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )

    def json(self, *, settings: Mapping[str, Any]) -> str:
        """``{"settings": {reward: {...}}, "pictures": [...], "skipped": [{"file", "reason"}]}``.

        A picture is ``{"file", "prompt", "scores": {reward: number or null}, "notes": [text]}``.
        """
        notes = self.notes or [[]] * len(self.files)
        pictures = [
            {
                "file": file,
                "prompt": prompt,
                "scores": {name: _finite(row[i]) for name, row in self.scores.items()},
                "notes": list(notes[i]),
            }
            for i, (file, prompt) in enumerate(zip(self.files, self.prompts, strict=True))
        ]
        content = {
            "settings": {name: dict(value) for name, value in settings.items()},
            "pictures": pictures,
            "skipped": [{"file": file, "reason": reason} for file, reason in self.skipped.items()],
        }
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def csv(self) -> str:
        """A header and one line for each picture: file, prompt, and each reward; empty = not finite."""
        out = io.StringIO(newline="")
        writer = csv.writer(out)
        writer.writerow(["file", "prompt", *self.scores])
        for i, (file, prompt) in enumerate(zip(self.files, self.prompts, strict=True)):
            values = [_finite(column[i]) for column in self.scores.values()]
            writer.writerow([file, prompt, *("" if value is None else repr(value) for value in values)])
        return out.getvalue()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
