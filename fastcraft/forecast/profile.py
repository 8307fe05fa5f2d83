"""Memory and time of the K steps on this machine, depth by depth and policy by policy, beside their prediction.

Settings are timed in turn, round by round, so that what else the machine does meets all of them alike.

What is measured: on CUDA the allocator's peak; on any machine, op by op (`AllocationTracker`), the bytes that are alive
when the decode begins' forward has ended and their peak; on a CPU also the process's resident set. All are above what
was there before the step, so weights and optimiser are not in them.
"""

import csv
import ctypes
import gc
import io
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from fastcraft.forecast.estimate import Prediction
from fastcraft.forecast.tracker import AllocationTracker

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One depth under one policy. Bytes are above what was there before the step; None = not to be had here."""

    depth: int
    policy: str
    plan: str
    held_mib: float
    """Alive at the end of the forward: what the K steps, decode, rewards and text encoder keep for backward."""
    peak_mib: float
    """Highest point, by the op-by-op count."""
    allocator_peak_mib: float | None
    """Highest point, by CUDA's allocator."""
    resident_peak_mib: float | None
    """Highest resident set, on a CPU."""
    predicted_peak_mib: float
    predicted_static_mib: float = 0.0
    """What the prediction counts besides, weights and optimiser: ``memory.budget_gib`` is for both together."""
    seconds: float = math.nan
    """Median of a micro-step, forward and backward; on a CPU processor time, which other work does not lengthen."""
    predicted_seconds: float = math.nan

    @property
    def error(self) -> float:
        """Relative error of the predicted peak, against the allocator where there is one."""
        return self.predicted_peak_mib / (self.allocator_peak_mib or self.peak_mib) - 1


def measure_row(
    step: Callable[[], Tensor],
    *,
    depth: int,
    policy: str,
    plan: str,
    predicted: Prediction,
    static_bytes: int,
    weights: Iterable[Tensor],
    device: torch.device,
) -> Row:
    """Run one setting: once to warm up, once for the machine's own peak, once counted op by op; not timed.

    Args:
        step: the forward of a micro-step; gives its loss. Gradients may pile up: they are cleared here.
        depth: K.
        policy: as named.
        plan: for people.
        predicted: of the same setting.
        static_bytes: the part of the prediction that is there all the time.
        weights: tensors that are there before; those that require gradient are the trained ones.
        device: where it runs.
    """
    weights = list(weights)
    resident, allocator = _peak_of(step, device, lambda: _clear(weights))
    _clear(weights)
    with AllocationTracker(weights) as tracker:
        loss = step()
        held = tracker.live
        loss.backward()
    _clear(weights)
    return Row(
        depth=depth, policy=policy, plan=plan, held_mib=held / 2**20, peak_mib=tracker.peak / 2**20,
        allocator_peak_mib=allocator, resident_peak_mib=resident,
        predicted_peak_mib=(predicted.peak_bytes - static_bytes) / 2**20,
        predicted_static_mib=static_bytes / 2**20, predicted_seconds=predicted.seconds,
    )  # fmt: skip


def time_steps(
    steps: Sequence[Callable[[], Tensor]], *, weights: Iterable[Tensor], device: torch.device, repeats: int
) -> list[float]:
    """Median seconds of each setting, forward and backward: ``repeats`` rounds in which each runs once.

    Args:
        steps: see `measure_row`; each has run before.
        weights: see `measure_row`.
        device: where they run.
        repeats: rounds.
    """
    weights = list(weights)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(repeats):
        for step, of_step in zip(steps, seconds, strict=True):
            _clear(weights)
            began = clock()
            step().backward()
            _synchronize(device)
            of_step.append(clock() - began)
    _clear(weights)
    return [statistics.median(of_step) for of_step in seconds]


def _clear(weights: Iterable[Tensor]) -> None:
    for tensor in weights:
        tensor.grad = None
    gc.collect()


def _peak_of(
    step: Callable[[], Tensor], device: torch.device, clear: Callable[[], None]
) -> tuple[float | None, float | None]:
    """(resident peak, allocator peak) of a step above what was there before, MiB; the first run is a warm-up."""
    step().backward()
    clear()
    if device.type == "cuda":
        _synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step().backward()
        _synchronize(device)
        return None, (torch.cuda.max_memory_allocated(device) - before) / 2**20
    before_kib = _restart_resident()
    if before_kib is None:
        return None, None
    step().backward()
    return (_resident("VmHWM") - before_kib) / 2**10, None


def _restart_resident() -> int | None:
    """Let Linux forget the largest resident set so far; the present one, KiB, or None where that cannot be done."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed still counts as resident until it is handed back
        _RESET.write_text("5")
        return _resident("VmRSS")
    except (OSError, AttributeError):  # not Linux, or another C library
        return None


def _resident(key: str) -> int:
    """A line of /proc/self/status, KiB."""
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(rows: Sequence[Row]) -> str:
    """The rows for a terminal."""
    peak = "allocator" if any(row.allocator_peak_mib for row in rows) else "resident"
    lines = [
        f"{'depth':>6}  {'policy':<20}{'held MiB':>10}{'peak MiB':>10}{'predicted':>11}{'error':>8}"
        f"{peak:>11}{'s/step':>9}  plan"
    ]
    for row in rows:
        lines.append(
            f"{row.depth:>6}  {row.policy:<20}{row.held_mib:>10.1f}{row.peak_mib:>10.1f}"
            f"{row.predicted_peak_mib:>11.1f}{row.error:>8.1%}"
            f"{_shown(row.allocator_peak_mib or row.resident_peak_mib):>11}{row.seconds:>9.2f}  {row.plan}"
        )
    return "\n".join(lines)


def _shown(mib: float | None) -> str:
    return "-" if mib is None else f"{mib:.1f}"


def as_csv(rows: Sequence[Row]) -> str:
    """The rows as comma-separated values with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(row).items()} for row in rows)
    return text.getvalue()
