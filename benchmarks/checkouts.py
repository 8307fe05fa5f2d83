"""Did a change make training slower? ``python -m benchmarks.checkouts OLD NEW``: rows of the ladder from two checkouts.

Each row runs in two processes, one with the code of either folder, which take their steps in turn, so that whatever
else the machine does meets both alike. Counted is processor time. Prints a table and writes ``--out``.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.step import Loop, loops

ROUNDS = 10
_WORKER = """
import sys, time, torch
from benchmarks.step_worker import fastcraft
from fastcraft.config import load_recipe

torch.set_num_threads(1)
step = fastcraft(load_recipe(sys.argv[1], sys.argv[2:]), torch.device("cpu"))
number = 0
for line in sys.stdin:
    began = time.process_time()
    for _ in range(int(line)):
        step(number)
        number += 1
    print("seconds", time.process_time() - began, flush=True)
"""


class Worker:
    """A row of the ladder in a process of its own, with the code of one checkout."""

    def __init__(self, folder: Path, recipe: str, settings: list[str]) -> None:
        environment = os.environ | {"PYTHONPATH": f"{folder}:{folder / 'kernels'}", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _WORKER, recipe, *settings], cwd=folder, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def seconds(self, steps: int) -> float:
        """Processor time of one of ``steps`` steps."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(steps, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("seconds"):
                return float(line.split()[1]) / steps
        raise SystemExit("benchmarks.checkouts: a worker ended")

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def compare(loop: Loop, old: Path, new: Path, *, recipe: str, batch_size: int, rounds: int) -> dict[str, Any]:
    """One row: seconds of a step under either, and the ratio pair by pair."""
    settings = [f"train.batch_size={batch_size}", *(item.format(batch_size=batch_size) for item in loop.overrides)]
    workers = [Worker(folder, recipe, settings) for folder in (old, new)]
    try:
        for worker in workers:
            worker.seconds(loop.cycle)  # the first steps make the optimiser's state
        pairs = [tuple(worker.seconds(loop.cycle) for worker in workers) for _ in range(rounds)]
    finally:
        for worker in workers:
            worker.close()
    ratios = sorted(after / before for before, after in pairs)
    return {
        "row": loop.key, "old_seconds": statistics.median(pair[0] for pair in pairs),
        "new_seconds": statistics.median(pair[1] for pair in pairs), "ratio": statistics.median(ratios),
        "smallest": ratios[0], "largest": ratios[-1],
    }  # fmt: skip


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="a checkout")
    parser.add_argument("new", type=Path, help="another one")
    parser.add_argument(
        "--loops", default="step,lean,none,reuse8", help="rows of benchmarks.step (default: %(default)s)"
    )
    parser.add_argument("--recipe", default="shapes")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="pairs of each row (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write JSON there")
    args = parser.parse_args()
    from fastcraft.evaluation.environment import environment

    known, rows = {loop.key: loop for loop in loops()}, []
    for key in args.loops.split(","):
        row = compare(
            known[key], args.old.resolve(), args.new.resolve(), recipe=args.recipe, batch_size=args.batch_size,
            rounds=args.rounds,
        )  # fmt: skip
        rows.append(row)
        print(f"{key:<8} {row['old_seconds']:.3f} s -> {row['new_seconds']:.3f} s", end="  ")
        print(f"x{row['ratio']:.3f} ({row['smallest']:.3f} to {row['largest']:.3f})", flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"rows": rows, "environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
