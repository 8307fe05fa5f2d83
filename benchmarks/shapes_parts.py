"""Which part to train? ``python -m benchmarks.shapes_parts``: Table 1 of TextCraftor (arXiv:2403.18978) in miniature.

For every seed the text encoder alone (recipe ``shapes_full``), the UNet alone (``shapes_unet``), the UNet under the
encoder that was tuned first, and both together (``shapes_text_unet``): the same rewards, pictures per step and number
of steps in each, judged on the same 200 held-out captions and noises. Writes ``results/shapes_parts/``. Runs that are
already in ``--runs`` are read, not repeated.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.shapes_quality import ROOT, read, spread

OUT = ROOT / "benchmarks" / "results" / "shapes_parts"
ROWS = {
    "text": ("shapes_full", []),
    "unet": ("shapes_unet", []),
    "text, then unet": ("shapes_unet", ["trained.text.mode=none", "trained.text.start={text}"]),
    "text and unet together": ("shapes_text_unet", []),
}
"""Row -> recipe and settings; ``{text}`` is the run of the row "text" with the same seed."""
SHOWN = ("fully_right", "count", "pattern", "shape", "size", "color", "relation", "reward/clip", "reward/aesthetic")


def train(runs: Path, row: str, seed: int) -> Path:
    """One run in a process of its own; its directory."""
    run_dir = folder(runs, row, seed)
    if (run_dir / "report.html").exists():
        return run_dir
    shutil.rmtree(run_dir, ignore_errors=True)  # one that was cut short
    recipe, settings = ROWS[row]
    command = [sys.executable, "fastcraft/train.py", "--ds_config", "ds_configs/zero2.json", "--recipe", recipe]
    command += ["--run-dir", str(run_dir), "--set", f"train.seed={seed}", "--set", "evaluate.every=0"]
    for setting in settings:
        command += ["--set", setting.format(text=folder(runs, "text", seed))]
    path = f"{ROOT}:{ROOT / 'kernels'}"
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": path})
    return run_dir


def folder(runs: Path, row: str, seed: int) -> Path:
    """Where a run lies."""
    return (runs / f"{row.replace(',', '').replace(' ', '_')}-{seed}").absolute()


def table(results: dict[str, dict[int, dict[str, Any]]]) -> str:
    """A row of means over the seeds for every way; differences are to the model before any training."""
    lines = ["| trained | difference in fully right |" + "".join(f" {name} |" for name in SHOWN), "|---" * 11 + "|"]
    before = [run["before"] for run in results["text"].values()]
    cells = "".join(f" {spread([row[name] for row in before])} |" for name in SHOWN)
    lines.append(f"| nothing | |{cells}")
    for row, runs in results.items():
        gains = [
            run["after"]["fully_right"] - results["text"][seed]["before"]["fully_right"] for seed, run in runs.items()
        ]
        cells = "".join(f" {spread([run['after'][name] for run in runs.values()])} |" for name in SHOWN)
        lines.append(f"| {row} | {spread([100 * gain for gain in gains])} points |{cells}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train, collect, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "shapes_parts", help="where the runs go")
    args = parser.parse_args()
    from fastcraft.evaluation.environment import environment

    results: dict[str, dict[int, dict[str, Any]]] = {row: {} for row in ROWS}
    for seed in args.seeds:  # seed by seed: what is cut short is whole for the seeds before
        for row in ROWS:
            results[row][seed] = read(train(args.runs, row, seed))
    OUT.mkdir(parents=True, exist_ok=True)
    command = f"python -m benchmarks.shapes_parts --seeds {' '.join(map(str, args.seeds))}"
    settings = {row: {"recipe": recipe, "settings": sets} for row, (recipe, sets) in ROWS.items()}
    document = {"command": command, "environment": environment(), "rows": settings, "results": results}
    (OUT / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    (OUT / "table.md").write_text(f"`{command}`\n\n{table(results)}")
    print(table(results))


if __name__ == "__main__":
    main()
