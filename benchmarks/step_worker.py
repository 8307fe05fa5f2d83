"""One loop of the step benchmark, alone in its process: a JSON job on the command line, a JSON line printed last."""

import dataclasses
import gc
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from benchmarks.published import PublishedLoop
from fastcraft.build.run import build_objective, build_order, build_run
from fastcraft.config import load_recipe
from fastcraft.data.order import sample_seed
from fastcraft.engine.agreement import close_distributed
from fastcraft.engine.ds_config import load_ds_config
from fastcraft.engine.zero2 import init_distributed
from fastcraft.recipe import Recipe
from fastcraft.train import _engine, _fill

DS_CONFIG = Path(__file__).parents[1] / "ds_configs" / "zero2.json"


def published(recipe: Recipe, device: torch.device, *, kind: str) -> Callable[[int], float]:
    """A step function of `PublishedLoop`; ``kind`` is its style, or "compiled"."""
    parts = build_run(recipe, device=device)
    loop = PublishedLoop(
        parts, style="repaired" if kind == "compiled" else kind, dtype=getattr(torch, recipe.train.dtype),  # type: ignore[arg-type]
        guidance_scale=recipe.sampler.guidance_scale, num_inference_steps=recipe.sampler.num_inference_steps,
        backprop_steps=recipe.objective.settings.backprop_steps, spacing=recipe.sampler.timestep_spacing,
    )  # fmt: skip
    if kind == "compiled":
        loop.compile()
    order = build_order(recipe, parts.prompts.training, parts.model.images, world_size=1)
    hollow: Any = {"text": None, "network": None, "vae": None}  # the loop has networks of its own
    noise = dataclasses.replace(parts.model.images, **hollow).noise
    del parts

    def step(number: int) -> float:
        batch = order.batch(number * recipe.train.batch_size, 0, batch_size=recipe.train.batch_size)
        seeds = [sample_seed(recipe.train.seed, index) for index in batch.indices]
        return loop.step(batch.prompts, noise(seeds)[0])

    return step


def fastcraft(recipe: Recipe, device: torch.device) -> Callable[[int], float]:
    """A step function of this project, through the ZeRO-2 engine."""
    init_distributed(device.type)
    parts = build_run(recipe, device=device)
    engine = _engine(recipe, parts, _fill(load_ds_config(DS_CONFIG), recipe, parts))
    objective = build_objective(recipe, parts, parts.model.through(engine))

    def step(number: int) -> float:
        total = 0.0
        for loss in objective.round(number):
            engine.begin()
            engine.backward(loss.loss * loss.share, closes_update=loss.closes_update)
            parts.judges.rewards.synchronize()
            engine.step()
            total += loss.share * float(loss.loss.detach())
        return total

    return step


def measure(step: Callable[[int], float], *, rounds: int, cycle: int, device: torch.device) -> dict[str, Any]:
    """Seconds per step of ``rounds`` cycles after one to warm up; a cycle is ``cycle`` steps, whose mean counts."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    before = held_mib(device)
    losses = [step(number) for number in range(cycle)]
    synchronize()
    reset_peak(device)
    seconds = []
    for turn in range(1, rounds + 1):
        began = time.perf_counter()
        losses += [step(turn * cycle + number) for number in range(cycle)]
        synchronize()
        seconds.append((time.perf_counter() - began) / cycle)
    peak = peak_mib(device)
    return {
        "seconds": seconds,
        "first_loss": losses[0],
        "peak_memory_mib": peak,
        "step_memory_mib": peak - before,  # optimiser state included, it is made in the first step
    }


def tensor_mib(step: Callable[[], float]) -> float:
    """Peak of what all tensors on the CPU take in a step, weights and optimiser included: the allocator's own events.

    The resident set of a process has its libraries, its compiler and what the C allocator keeps besides.
    """
    gc.collect()
    storages = {}
    for item in filter(_is_on_cpu, gc.get_objects()):
        if item.layout == torch.strided:
            storages[item.untyped_storage()._cdata] = item.untyped_storage().nbytes()
        else:  # weights in the compiler's own layout
            storages[id(item)] = item.numel() * item.element_size()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    recorded: Any = profile.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return (sum(storages.values()) + max(itertools.accumulate(changes, initial=0))) / 2**20


def _is_on_cpu(item: object) -> bool:
    """Whether ``item`` is a tensor with memory on the CPU; the compiler keeps others, which only look so."""
    kinds = type(item).__mro__  # isinstance would ask lazy objects for their class
    return torch.Tensor in kinds and FakeTensor not in kinds and item.device.type == "cpu"  # type: ignore[attr-defined]


def count(recipe: Recipe, device: torch.device) -> dict[str, float]:
    """Arithmetic of one sample without recomputation, text and rewards included; and the best rate of a product."""
    from torch.utils.flop_counter import FlopCounterMode

    parts = build_run(recipe, device=device)
    objective = build_objective(recipe, parts, parts.model.images)
    with FlopCounterMode(display=False) as counter:
        next(objective.round(0)).loss.backward()
    size = 8192 if device.type == "cuda" else 1024
    x = torch.randn(size, size, dtype=getattr(torch, recipe.train.dtype), device=device)
    seconds = []
    for _ in range(12):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        y = x @ x
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    del y
    return {
        "flops_per_sample": counter.get_total_flops(),
        "matmul_flops_per_sec": 2 * size**3 / min(seconds),
        "matmul_size": size,
    }


def held_mib(device: torch.device) -> float:
    """What is held now: by the CUDA allocator, or this process's resident set (on Linux)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def reset_peak(device: torch.device) -> None:
    """Begin a new peak, so that loading does not count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib(device: torch.device) -> float:
    """Largest allocation of the CUDA allocator, or largest resident set, since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10


def main() -> None:
    """Run the job and print what came of it."""
    job = json.loads(sys.argv[1])
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    recipe = load_recipe(job["recipe"], job["overrides"])
    if job["kind"] == "count":
        result: dict[str, Any] = count(recipe, device)
    else:
        step = fastcraft(recipe, device) if job["kind"] == "fastcraft" else published(recipe, device, kind=job["kind"])
        result = measure(step, rounds=job["rounds"], cycle=job["cycle"], device=device)
        if device.type == "cpu":
            result["tensor_memory_mib"] = tensor_mib(lambda: step((job["rounds"] + 1) * job["cycle"]))
    print(json.dumps(result), flush=True)
    if torch.distributed.is_initialized():
        close_distributed()


if __name__ == "__main__":
    main()
