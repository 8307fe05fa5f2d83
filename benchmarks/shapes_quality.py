"""Does it work? ``python -m benchmarks.shapes_quality --seeds 0 1 2``: the judge before and after, on the miniature.

For every seed: ``shapes_full`` (CLIP reward with the aesthetic one), the same with TextCraftor's last five steps and
prefix, and that without the CLIP constraint (the aesthetic reward alone), which is what reward hacking looks like.
Writes ``results/shapes_quality/``: JSON, a table, the reward curves and pictures of the first run. Runs that are
already in ``--runs`` are read, not repeated.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "shapes_quality"
TEXTCRAFTOR = ["objective.truncation=last", "objective.input_grad=true", "text.prefix_encoder=original"]
VARIANTS = {
    "shapes_full": [],
    "textcraftor": TEXTCRAFTOR,
    "unconstrained": [*TEXTCRAFTOR, "rewards.0.weight=0", "rewards.1.weight=1"],
}
EXAM = ("fully_right", "color", "shape", "count", "relation", "size", "pattern", "background")


def train(run_dir: Path, seed: int, settings: list[str]) -> None:
    """One run of ``shapes_full`` in a process of its own."""
    if (run_dir / "report.html").exists():
        return
    command = [sys.executable, "fastcraft/train.py", "--ds_config", "ds_configs/zero2.json", "--recipe", "shapes_full"]
    command += ["--run-dir", str(run_dir), "--set", f"train.seed={seed}"]
    for setting in settings:
        command += ["--set", setting]
    path = f"{ROOT}:{ROOT / 'kernels'}"
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": path})


def read(run_dir: Path) -> dict[str, Any]:
    """The exam before and after, and the reward curve of one run."""
    evaluations = [json.loads(line)["evaluation"] for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "before": evaluations[0],
        "after": evaluations[-1],
        "reward_curve": [{"step": row["step"], **row["rewards"]} for row in metrics],
        "minutes": sum(row["step_time_s"] for row in metrics) / 60,
        "samples_per_sec": statistics.median(row["samples_per_sec_per_gpu"] for row in metrics),
    }


def spread(values: list[float]) -> str:
    """Mean and, from two values on, the sample standard deviation."""
    mean = statistics.mean(values)
    return f"{mean:.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def table(results: dict[str, dict[int, dict[str, Any]]]) -> str:
    """One row per metric: before and after for every variant, mean and spread over the seeds."""
    lines = []
    for variant, runs in results.items():
        lines += [f"**{variant}**, seeds {', '.join(map(str, runs))}", "", "| | before | after | difference |"]
        lines.append("|---|---|---|---|")
        names = [name for name in next(iter(runs.values()))["after"] if not name.startswith("reward_se/")]
        for name in sorted(names, key=lambda n: (EXAM.index(n) if n in EXAM else len(EXAM), n)):
            before = [run["before"][name] for run in runs.values()]
            after = [run["after"][name] for run in runs.values()]
            difference = [b - a for a, b in zip(before, after, strict=True)]
            lines.append(f"| {name} | {spread(before)} | {spread(after)} | {spread(difference)} |")
        lines.append("")
    return "\n".join(lines)


def plot(results: dict[str, dict[int, dict[str, Any]]], path: Path) -> None:
    """Reward curves of every run: the CLIP and the aesthetic score of the training batches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    colors = dict(zip(VARIANTS, ("tab:blue", "tab:green", "tab:red"), strict=True))
    for axis, reward in zip(axes, ("clip", "aesthetic"), strict=True):
        for variant, runs in results.items():
            for number, run in enumerate(runs.values()):
                values = [row[reward] for row in run["reward_curve"]]
                smooth = [statistics.mean(values[max(0, i - 9) : i + 1]) for i in range(len(values))]
                axis.plot(smooth, color=colors[variant], alpha=0.8, label=variant if number == 0 else None)
        axis.set(xlabel="optimiser step", ylabel=f"{reward} score, mean of 10 steps")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train, collect, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "shapes_quality", help="where the runs go")
    args = parser.parse_args()
    from fastcraft.evaluation.environment import environment

    results: dict[str, dict[int, dict[str, Any]]] = {}
    for variant in args.variants:
        for seed in args.seeds:
            run_dir = args.runs / f"{variant}-{seed}"
            train(run_dir, seed, VARIANTS[variant])
            results.setdefault(variant, {})[seed] = read(run_dir)
    OUT.mkdir(parents=True, exist_ok=True)
    command = f"python -m benchmarks.shapes_quality --seeds {' '.join(map(str, args.seeds))}"
    document = {"command": command, "environment": environment(), "settings": VARIANTS, "results": results}
    (OUT / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    (OUT / "table.md").write_text(f"`{command}`\n\n{table(results)}")
    plot(results, OUT / "reward_curves.png")
    samples = sorted((args.runs / f"{args.variants[0]}-{args.seeds[0]}" / "samples").glob("*.png"))
    shutil.copyfile(samples[0], OUT / "before.png")
    shutil.copyfile(samples[-1], OUT / "after.png")
    print(table(results))


if __name__ == "__main__":
    main()
