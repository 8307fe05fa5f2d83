"""Run by test_checkpoint.py: children that save in a loop are killed at random moments; prints one line per trial.

One process imports torch and forks the children, so that a trial costs milliseconds.
"""

import os
import random
import select
import signal
import sys
import time
from pathlib import Path

import torch

from fastcraft.engine.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    rng_tensors,
    save_checkpoint,
    sweep_checkpoints,
)


def save_forever(directory: Path, step: int, saves_per_step: int, acknowledge: int) -> None:
    while True:
        step += 1
        for _ in range(saves_per_step):
            tensors = {"param.w": torch.full((5000,), float(step)), "exp_avg.w": torch.full((5000,), float(step))}
            save_checkpoint(directory, step, tensors=tensors, rank_tensors=rng_tensors(), state={"step": step}, keep=2)
            os.write(acknowledge, step.to_bytes(4, "little"))


def trial(directory: Path, seed: int) -> str:
    generator = random.Random(seed)
    started_from = load_checkpoint(find_checkpoint(directory)[0], rank=0, world_size=1).step if seed else 0
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        save_forever(directory, started_from, 1 + seed % 2, writer)
    os.close(writer)
    select.select([reader], [], [], 20)  # the first save of this child is done
    time.sleep(generator.uniform(0.0, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    acknowledged = started_from
    while data := os.read(reader, 4):
        acknowledged = int.from_bytes(data, "little")
    os.close(reader)
    left = sorted(path.name for path in directory.iterdir())
    before_sweep = find_checkpoint(directory)[0].name
    sweep_checkpoints(directory)
    path, skipped = find_checkpoint(directory)
    found = load_checkpoint(path, rank=0, world_size=1)
    whole = (
        all(bool((tensor == found.step).all()) for tensor in found.tensors.values())
        and found.state["step"] == found.step
    )
    good = whole and found.step >= acknowledged and not skipped and before_sweep.strip(".").startswith(path.name)
    good = good and not [name for name in os.listdir(directory) if name.startswith(".")]
    return f"{'good' if good else 'bad'} acknowledged={acknowledged} found={found.step} left={left}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for number in range(int(sys.argv[2])):
        print(trial(Path(sys.argv[1]), number), flush=True)
