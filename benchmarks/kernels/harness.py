"""How an op is timed: what is run, on what, against which limits of the machine.

Every row has the time of a call as a program makes it (pytest-benchmark: synchronised, median and spread) and, on CUDA,
the time of the same call replayed from a CUDA graph, where Python and launches cost nothing: ``warm`` back to back,
``cold`` after the L2 cache has been overwritten. Bytes and FLOPs are the least that the op needs, not what a provider
moves, so that rates of different providers compare.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

FORWARD, BOTH = "fwd", "fwd+bwd"
DIRECTIONS = (FORWARD, BOTH)
Inputs = dict[str, Tensor]
GRAPH_CALLS = 10
_KEYS = ("op", "workload", "direction", "provider")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One shape of an op, named by model and resolution.

    ``make``: device and dtype to named inputs, those that get a gradient with ``requires_grad``. ``num_bytes`` and
    ``flops``: per direction (forward, forward and backward), for 2-byte elements where it says bytes.
    """

    name: str
    make: Callable[[torch.device, torch.dtype], Inputs]
    num_elements: tuple[int, int] = (0, 0)
    flops: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        return self.name


@dataclass(kw_only=True)
class Machine:
    """The device, and its limits measured in this run: bytes/s of a copy (read + write), FLOP/s of a matrix product."""

    device: torch.device
    dtype: torch.dtype
    copy_rate: float
    matmul_rate: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    flush: Tensor | None = None

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"


def measure_machine() -> Machine:
    """Copy bandwidth and matrix rate of this machine, medians."""
    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    source = torch.randn(2**29 if cuda else 2**22, device=device).to(dtype)
    target = torch.empty_like(source)
    size = 8192 if cuda else 512
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    copy = _median_seconds(lambda: target.copy_(source), cuda)
    matmul = _median_seconds(lambda: a @ b, cuda)
    return Machine(
        device=device, dtype=dtype, copy_rate=2 * source.numel() * source.element_size() / copy,
        matmul_rate=2 * size**3 / matmul,
        flush=torch.empty(2**28, dtype=torch.int8, device=device) if cuda else None,
    )  # fmt: skip


def measure(
    benchmark: Any, machine: Machine, *, op: str, provider: str, function: Callable[..., Any], workload: Workload,
    direction: str,
) -> None:  # fmt: skip
    """Time ``function(**inputs)`` and add a row to the run's table; skip where the provider refuses the shape."""
    torch.manual_seed(0)
    torch.compiler.reset()  # otherwise the tenth shape of a function would run uncompiled
    inputs = workload.make(machine.device, machine.dtype)
    call = _bind(function, inputs, direction)
    try:
        call()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if provider == "ours":
            raise
        pytest.skip(f"{provider} refuses {workload}: {(str(error) or type(error).__name__).splitlines()[0][:120]}")
    calls = 10 if machine.is_cuda else 1

    def run() -> None:
        for _ in range(calls):
            call()
        if machine.is_cuda:
            torch.cuda.synchronize()

    row: dict[str, Any] = {"op": op, "workload": workload.name, "direction": direction, "provider": provider}
    if machine.is_cuda:
        row |= graph_times(call, machine)
    benchmark.extra_info.update(row)
    benchmark.pedantic(run, rounds=20 if machine.is_cuda else 3, warmup_rounds=2)
    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds = statistics.quantiles(benchmark.stats.stats.data, n=10)
    row["call_us"] = statistics.median(benchmark.stats.stats.data) / calls * 1e6
    row["call_us_20_80"] = [seconds[1] / calls * 1e6, seconds[7] / calls * 1e6]
    best = row.get("warm_us") or row["call_us"]
    which = DIRECTIONS.index(direction)
    num_bytes = workload.num_elements[which] * machine.dtype.itemsize
    row["gb_per_s"], row["of_copy"] = num_bytes / best / 1e3, num_bytes / best * 1e6 / machine.copy_rate
    row["tflop_per_s"] = workload.flops[which] / best / 1e6
    row["of_matmul"] = workload.flops[which] / best * 1e6 / machine.matmul_rate
    for other in machine.rows:
        if direction == BOTH and [other[k] for k in _KEYS] == [op, workload.name, FORWARD, provider]:
            row["bwd_us"] = best - (other.get("warm_us") or other["call_us"])
    benchmark.extra_info.update(row)
    machine.rows.append(row)


def graph_times(call: Callable[[], Any], machine: Machine) -> dict[str, Any]:
    """Microseconds of one call inside a CUDA graph, ``warm`` and ``cold``: medians, and the warm one's spread."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    many, one = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(many):
            for _ in range(GRAPH_CALLS):
                call()
        with torch.cuda.graph(one):
            call()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return {"graph_refused": str(error).splitlines()[0][:120]}
    assert machine.flush is not None
    warm, cold = [], []
    for _ in range(30):
        machine.flush.zero_()  # also gives the queue work, so that the events below never wait for Python
        warm.append(_between_events(many) / GRAPH_CALLS)
        machine.flush.zero_()
        cold.append(_between_events(one))
    low, middle, high = (statistics.quantiles(warm[5:], n=10)[i] for i in (1, 4, 7))
    return {"warm_us": middle, "warm_us_20_80": [low, high], "cold_us": statistics.median(cold[5:])}


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of text: one row a measurement; ``x first`` compares with the first provider of the same shape.

    ``bwd`` is the difference of the two directions.
    """
    lines = [
        f"{'op':<16} {'shape':<26} {'what':<8} {'provider':<18} {'call us':>9} {'warm us':>9} {'cold us':>9} "
        f"{'bwd us':>9} "
        f"{'GB/s':>7} {'copy':>5} {'TFLOP/s':>8} {'matmul':>6} {'x first':>7}"
    ]
    first: dict[tuple[str, str, str], float] = {}
    for row in rows:
        key = row["op"], row["workload"], row["direction"]
        best = row.get("warm_us") or row["call_us"]
        ratio = first.setdefault(key, best) / best
        graph = "".join(f" {row[k]:>9.1f}" if k in row else f" {'-':>9}" for k in ("warm_us", "cold_us", "bwd_us"))
        lines.append(
            f"{key[0]:<16} {key[1]:<26} {key[2]:<8} {row['provider']:<18} {row['call_us']:>9.1f}{graph} "
            f"{row['gb_per_s']:>7.0f} {row['of_copy']:>5.0%} {row['tflop_per_s']:>8.1f} {row['of_matmul']:>6.0%} "
            f"{ratio:>6.2f}x"
        )
    return lines


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` on CUDA; a CPU without a compiler has no such provider."""

    def call(**inputs: Tensor) -> Any:
        if not torch.cuda.is_available():
            raise NotImplementedError("measured on CUDA only")
        return wrapped(**inputs)

    wrapped = torch.compile(function, dynamic=False)
    return call


def _bind(function: Callable[..., Any], inputs: Inputs, direction: str) -> Callable[[], Any]:
    if direction == FORWARD:

        def forward() -> Any:
            with torch.no_grad():
                return function(**inputs)

        return forward
    wanted = [x for x in inputs.values() if x.requires_grad]
    cotangents: list[Tensor] = []

    def both() -> Any:
        outputs = function(**inputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        if not cotangents:
            cotangents.extend(torch.randn_like(y) for y in outputs)
        return torch.autograd.grad(outputs, wanted, cotangents)

    return both


def _between_events(graph: Any) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def _median_seconds(call: Callable[[], Any], cuda: bool) -> float:
    seconds = []
    for _ in range(12):
        began = time.perf_counter()
        for _ in range(5 if cuda else 1):
            call()
        if cuda:
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - began) / (5 if cuda else 1))
    return statistics.median(seconds[2:])
