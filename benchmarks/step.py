"""Samples/s and peak memory of the whole optimiser step, loop by loop: ``python -m benchmarks.step [--out FILE]``.

Other people's loops (`benchmarks.published`) and this project's ladder, one lever at a time, with the same models,
prompts, noise and machine in one run. Every loop has a process of its own, so that its peak memory is its own; the
loops take turns, so that a noisy machine bothers all alike. What counts is the ratio of medians. Making the prefixes is
part of every time: with reuse, a measured cycle is one step that makes them and those that find them.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastcraft.config import load_recipe
from fastcraft.evaluation.environment import environment

MEMORY = ("peak_memory_mib", "step_memory_mib", "tensor_memory_mib")
"""What the worker says of memory; the last on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Loop:
    """One row: ``key`` for the command line, what the worker is told, and steps of a cycle."""

    key: str
    name: str
    kind: str = "fastcraft"
    overrides: tuple[str, ...] = ()
    cycle: int = 1
    needs_gpu: bool = False


def loops() -> list[Loop]:
    """Every row, in the order of the table.

    A row of ours that begins with a plus has the levers of those above it. The first ladder takes no more memory than
    the repaired loop, the second takes what it can use.
    """
    stepwise = ("kernels.backend=reference", "memory.policy=step")
    lean = ("kernels.backend=reference", "memory.policy=last_k_live:1", "memory.decode_micro_batch=2")
    keep = ("kernels.backend=reference", "memory.policy=none")
    fused, whole = ("kernels.backend=auto", "memory.policy=none"), "kernels.compile=whole"

    def reuse(times: int) -> tuple[str, str]:
        return f"memory.prefix_reuse={times}", "memory.prefix_pool={batch_size}"

    def graphs(calls: str) -> tuple[str, ...]:
        return *fused, f"kernels.cuda_graphs={calls}"

    def compiled(part: str) -> tuple[str, ...]:
        return *fused, f"kernels.compile={part}"

    ours = [
        Loop(key="step", name="fastcraft: text keys once", overrides=stepwise),
        Loop(key="lean", name="+ head 2 by 2, last step kept", overrides=lean),
        Loop(key="lean_compiled", name="+ UNet compiled", overrides=(*lean, whole)),
        Loop(key="lean_reuse8", name="+ each prefix used 8x", overrides=(*lean, whole, *reuse(8)), cycle=8),
        Loop(key="none", name="fastcraft: no recompute", overrides=keep),
        Loop(key="fused", name="+ fused kernels", overrides=fused, needs_gpu=True),
        *(
            Loop(key=f"reuse{n}", name=f"+ each prefix used {n}x", overrides=(*fused, *reuse(n)), cycle=n)
            for n in (2, 4, 8)
        ),
        Loop(key="graphed", name="fastcraft: prefix from a CUDA graph", overrides=graphs("prefix"), needs_gpu=True),
        Loop(key="graphs", name="fastcraft: every step from CUDA graphs", overrides=graphs("all"), needs_gpu=True),
        Loop(key="blocks", name="fastcraft: compiled blocks", overrides=compiled("blocks"), needs_gpu=True),
        Loop(key="whole", name="fastcraft: UNet compiled, no recompute", overrides=compiled("whole")),
    ]
    return [
        Loop(key="published", kind="published", name="TextCraftor as published", overrides=("train.dtype=float32",)),
        Loop(key="repaired", kind="repaired", name="the same, repaired"),
        Loop(key="compiled", kind="compiled", name="repaired + torch.compile", needs_gpu=True),
        Loop(key="alignprop", kind="alignprop", name="AlignProp-style"),
        *ours,
    ]


def run_worker(job: dict[str, Any]) -> dict[str, Any]:
    """One job in a process of its own; a device that is too small is a result, anything else that fails an error."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.step_worker", json.dumps(job)], capture_output=True, text=True
    )
    if done.returncode == 0:
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result
    if "OutOfMemoryError" in done.stderr or "out of memory" in done.stderr:
        return {"error": "out of memory"}
    if "the compiled UNet's gradient differs" in done.stderr or "differs from eager's by" in done.stderr:
        return {"error": done.stderr.strip().splitlines()[-1]}
    raise SystemExit(f"benchmarks.step: {job} failed:\n{done.stderr[-3000:]}")


class Bench:
    """All turns of all loops.

    Args:
        recipe: name or file.
        overrides: for every loop, before its own.
        batches: batch sizes to try; each loop keeps its best.
        rounds: measured cycles of a turn.
    """

    def __init__(self, recipe: str, overrides: Sequence[str], *, batches: Sequence[int], rounds: int) -> None:
        self.recipe, self.overrides, self.batches, self.rounds = recipe, overrides, batches, rounds
        self.rows: dict[str, dict[str, Any]] = {}

    def job(self, kind: str, overrides: Sequence[str], batch_size: int, cycle: int = 1) -> dict[str, Any]:
        """What the worker is told."""
        own = [item.format(batch_size=batch_size) for item in overrides]
        settings = [*self.overrides, f"train.batch_size={batch_size}", *own]
        return {"kind": kind, "recipe": self.recipe, "overrides": settings, "cycle": cycle, "rounds": self.rounds}

    def turn(self, loop: Loop) -> None:
        """Measure a loop once more; in its first turn at every batch size, later at its best one."""
        row = self.rows.get(loop.key)
        for batch_size in self.batches if row is None else [row["batch_size"]] if row.get("seconds") else []:
            result = run_worker(self.job(loop.kind, loop.overrides, batch_size, loop.cycle))
            print(f"{loop.name}, batch {batch_size}: {summary(result)}", file=sys.stderr, flush=True)
            if "error" in result:
                self.rows.setdefault(loop.key, {"name": loop.name, **result})
                break  # a larger batch will not fit either
            found = {"name": loop.name, "kind": loop.kind, "batch_size": batch_size, "cycle": loop.cycle, **result}
            if row is not None:
                found["seconds"] = row["seconds"] + found["seconds"]
                for key in MEMORY:
                    if key in found:
                        found[key] = max(row[key], found[key])
            best = self.rows.get(loop.key)
            if row is not None or best is None or rate(found) > rate(best):
                self.rows[loop.key] = found

    def finish(self, counted: dict[str, Any]) -> list[dict[str, Any]]:
        """Rows with their ratios; MFU where every sample's arithmetic is done."""
        measured = {key: row for key, row in self.rows.items() if row.get("seconds")}
        for row in measured.values():
            row["seconds_20_50_80"] = [statistics.quantiles(row["seconds"], n=10)[i] for i in (1, 4, 7)]
            row["samples_per_sec"] = rate(row)
            for key in ("published", "repaired"):
                if key in measured:
                    row[f"ratio_to_{key}"] = rate(row) / rate(measured[key])
            if row["cycle"] == 1:
                row["mfu"] = rate(row) * counted["flops_per_sample"] / counted["matmul_flops_per_sec"]
        return list(self.rows.values())


def rate(row: dict[str, Any]) -> float:
    """Samples/s by the median; 0 where nothing was measured."""
    return row["batch_size"] / statistics.median(row["seconds"]) if row.get("seconds") else 0.0


def summary(result: dict[str, Any]) -> str:
    """One result, while the run goes on."""
    if "error" in result:
        return str(result["error"])
    return f"{statistics.median(result['seconds']):.3f} s/step, {result['peak_memory_mib']:.0f} MiB"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as markdown."""
    lines = [
        "| loop | batch | samples/s | s/step (20/50/80 %) | vs published | vs repaired | peak MiB | of step | "
        "tensors | MFU |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if not row.get("seconds"):
            lines.append(f"| {row['name']} | | {row['error']} | | | | | | | |")
            continue
        spread = " / ".join(f"{value:.3f}" for value in row["seconds_20_50_80"])
        ratios = [f"{row[key]:.2f}x" if key in row else "" for key in ("ratio_to_published", "ratio_to_repaired")]
        memory = [f"{row[key]:.0f}" if key in row else "" for key in MEMORY]
        mfu = f"{row['mfu']:.0%}" if "mfu" in row else ""
        cells = [row["name"], f"{row['batch_size']}", f"{row['samples_per_sec']:.2f}", spread, *ratios, *memory, mfu]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], file: Path, *, title: str) -> None:
    """Two bar charts side by side: samples/s with the 20-80 % spread, and the memory of the step or of all tensors."""
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row.get("seconds")]
    batches = {row["batch_size"] for row in rows}
    figure, (speed, memory) = plt.subplots(
        1, 2, figsize=(11, 1.4 + 0.42 * len(rows)), sharey=True, width_ratios=(3, 2), layout="constrained"
    )
    names = [row["name"] if len(batches) == 1 else f"{row['name']} (batch {row['batch_size']})" for row in rows]
    colours = ["#2a6f97" if row["kind"] == "fastcraft" else "#a9adb3" for row in rows]
    spreads = [[row["batch_size"] / row["seconds_20_50_80"][i] for i in (2, 0)] for row in rows]
    kind = "tensor_memory_mib" if all("tensor_memory_mib" in row for row in rows) else "step_memory_mib"
    rates, bytes_ = [row["samples_per_sec"] for row in rows], [row[kind] for row in rows]
    places = range(len(rows))  # names may be the same in two ladders
    speed.barh(places, rates, color=colours, height=0.68)
    memory.barh(places, bytes_, color=colours, height=0.68)
    speed.set_yticks(places, names)
    for position, (value, (slow, fast), mib) in enumerate(zip(rates, spreads, bytes_, strict=True)):
        speed.plot([slow, fast], [position, position], color="#222222", linewidth=1.2)
        speed.annotate(f"{value:.2f}", (max(value, fast), position), (5, 0), textcoords="offset points", va="center")
        memory.annotate(f"{mib:,.0f}", (mib, position), (5, 0), textcoords="offset points", va="center")
    for axis, largest, label in (
        (speed, max(max(pair) for pair in spreads), "samples/s (bar: median; line: 20 to 80 %)"),
        (memory, max(bytes_), "tensors at the peak (MiB)" if "tensor" in kind else "memory of the step (MiB)"),
    ):
        axis.set_xlabel(label)
        axis.set_xlim(0, max(largest, 1e-9) * 1.18)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    speed.invert_yaxis()
    figure.suptitle(title + (f", batch {batches.pop()}" if len(batches) == 1 else ""), fontsize=11)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    known = [loop.key for loop in loops()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="shapes")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE")
    parser.add_argument("--loops", default=",".join(known), help=f"some of {','.join(known)}")
    parser.add_argument("--batches", default="", help="batch sizes to try, as 4,8,16; default: the recipe's")
    parser.add_argument("--rounds", type=int, default=3, help="measured cycles of a loop in a turn")
    parser.add_argument("--turns", type=int, default=2, help="turns of every loop, each a new process")
    parser.add_argument("--out", type=Path, help="JSON file for the result; the chart lies beside it as .png")
    args = parser.parse_args(argv)
    args.loops = args.loops.split(",")
    for key in args.loops:
        if key not in known:
            parser.error(f"--loops: unknown loop {key!r}; known: {', '.join(known)}")
    if args.rounds * args.turns < 2:
        parser.error(f"--rounds x --turns must be at least 2, got {args.rounds} x {args.turns}")
    return args


def main() -> None:
    """Measure, print the table, write JSON and chart."""
    args = parse()
    recipe = load_recipe(args.recipe, args.overrides)
    batches = sorted(int(size) for size in args.batches.split(",")) if args.batches else [recipe.train.batch_size]
    chosen = [loop for loop in loops() if loop.key in args.loops]
    skipped = [loop for loop in chosen if loop.needs_gpu and not torch.cuda.is_available()]
    for loop in skipped:
        print(f"{loop.name}: left out, it needs a GPU", file=sys.stderr)
    bench = Bench(args.recipe, args.overrides, batches=batches, rounds=args.rounds)
    counted = run_worker(bench.job("count", ("kernels.backend=reference", "memory.policy=none"), 1))
    for _ in range(args.turns):
        for loop in chosen:
            if loop not in skipped:
                bench.turn(loop)
    rows = bench.finish(counted)
    print(table(rows))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        found = environment()
        result = {
            "command": " ".join(["python", "-m", "benchmarks.step", *sys.argv[1:]]),
            "environment": found,
            "threads": torch.get_num_threads(),
            **counted,
            "rows": rows,
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        machine = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else f"{found['cpu']}, {result['threads']} thread"
        )
        depth = recipe.objective.settings.backprop_steps
        sizes = f"T = {recipe.sampler.num_inference_steps}, K = {depth}, {recipe.train.dtype}"
        plot(rows, args.out.with_suffix(".png"), title=f"{args.recipe} ({sizes}) on {machine}")


if __name__ == "__main__":
    main()
