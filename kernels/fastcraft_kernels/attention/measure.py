"""Fill the dispatch table: time every provider on the present card, each direction by itself.

A provider has to be right before it may be fast: its result is compared with plain PyTorch in float32 first.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcraft_kernels.attention.dispatch import DIRECTIONS, Row
from fastcraft_kernels.attention.providers import PROVIDERS, Provider
from fastcraft_kernels.attention.tiles import HEAD_SPLITS
from fastcraft_kernels.launch import device_facts

SEQUENCES = (64, 256, 1024, 4096, 9216, 16384)
Timer = Callable[[Callable[[], object]], list[float]]


def measure_attention(
    path: Path | str | None = None, *, head_dims: Sequence[int] = tuple(HEAD_SPLITS),
    sequences: Sequence[int] = SEQUENCES, batch: int = 2, heads: int = 8, dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:  # fmt: skip
    """Time all providers on the current CUDA device and pick the fastest for each key.

    Args:
        path: JSON file to write; `load_attention_table` reads it, and so does the package as ``dispatch.json``.
        head_dims: among 40, 64, 80, 160.
        sequences: tokens.
        batch: samples; 2 is one picture with classifier-free guidance.
        heads: heads of a sample.
        dtype: float16 or bfloat16.

    Returns:
        ``{"about": ..., "rows": [...]}``; a row has the medians in ``milliseconds``, the 20th and 80th percentiles in
        ``spread``, and in ``refused`` who could not or did not give the right answer, and why. Times are of single
        calls back to back: at few tokens they include what Python needs to launch.

    Raises:
        ValueError: no CUDA device, or an argument out of range.
    """
    if not torch.cuda.is_available():
        raise ValueError("measure_attention: a CUDA device must be present, found none")
    wrong = [width for width in head_dims if width not in HEAD_SPLITS]
    if wrong:
        raise ValueError(f"measure_attention: head_dims must be among {', '.join(map(str, HEAD_SPLITS))}, got {wrong}")
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"measure_attention: dtype must be float16 or bfloat16, got {dtype}")
    for name, least in (("sequences", min(sequences, default=0)), ("batch", batch), ("heads", heads)):
        if least < 1:
            raise ValueError(f"measure_attention: {name} must be at least 1, got {least}")
    device = torch.device("cuda", torch.cuda.current_device())
    origin = (
        f"measured on {torch.cuda.get_device_name(device)}: torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"batch {batch}, {heads} heads, {dtype}"
    )
    rows = []
    for head_dim in head_dims:
        for sequence in sequences:
            generator = torch.Generator(device).manual_seed(0)
            shape = (batch, sequence, heads, head_dim)
            inputs = [torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(4)]
            for row in measure_case(PROVIDERS, inputs, timer=_time_ms):
                rows.append({"arch": device_facts(device).arch, **row, "origin": origin})
    table = {"about": f"Measured by measure_attention. {origin}", "rows": rows}
    if path is not None:
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        text = f'{{\n "about": {json.dumps(table["about"])},\n "rows": [\n{lines}\n ]\n}}\n'
        Path(path).write_text(text, encoding="utf-8")
    return table


def measure_case(providers: Mapping[str, Provider], inputs: Sequence[Tensor], *, timer: Timer) -> list[Row]:
    """Rows of both directions for q, k, v and the output's gradient (``inputs``), without ``arch`` and ``origin``.

    ``"reference"`` sets the answer, in float32, and is no candidate.
    """
    q, k, v, dout = inputs
    scale = q.shape[-1] ** -0.5
    reference = PROVIDERS["reference"]
    wide = [x.float() for x in inputs]
    out, lse = reference.forward(*wide[:3], scale)
    grads = reference.backward(wide[3], *wide[:3], out, lse, scale)
    saved = (q, k, v, out.to(q.dtype), lse)
    rows = []
    for direction in DIRECTIONS:
        milliseconds, spread, refused = {}, {}, {}
        for name in (name for name in providers if name != "reference"):
            provider = providers[name]
            refusal = provider.refusal(q.device, q.dtype, q.shape[-1])
            call, exact = (
                _call(provider, direction, saved, dout, scale),
                (out, lse) if direction == "forward" else grads,
            )
            if refusal is None:
                refusal = _wrong(call, exact, q.dtype)
            if refusal is not None:
                refused[name] = refusal
                continue
            times = timer(call)
            milliseconds[name] = round(statistics.median(times), 5)
            spread[name] = [round(x, 5) for x in (_percentile(times, 20), _percentile(times, 80))]
        best = min(milliseconds, key=lambda name: milliseconds[name], default="sdpa")
        rows.append({
            "head_dim": q.shape[-1], "sequence": q.shape[1], "direction": direction, "provider": best,
            "milliseconds": milliseconds, "spread": spread, "refused": refused,
        })  # fmt: skip
    return rows


def _call(
    provider: Provider, direction: str, saved: tuple[Tensor, ...], dout: Tensor, scale: float
) -> Callable[[], tuple[Tensor, ...]]:
    if direction == "forward":
        return lambda: provider.forward(*saved[:3], scale)
    return lambda: provider.backward(dout, *saved, scale)


def _wrong(call: Callable[[], tuple[Tensor, ...]], exact: Sequence[Tensor], dtype: torch.dtype) -> str | None:
    """What is wrong with a provider's answer: an error, or a distance that the dtype does not explain."""
    try:
        results = call()
    except (RuntimeError, ValueError, NotImplementedError, ImportError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
    for got, want in zip(results, exact, strict=True):
        distance = ((got.float() - want).norm() / want.norm()).item()
        if not distance <= 4 * torch.finfo(dtype).eps:
            return f"its answer is wrong: relative distance {distance:.2e} from float32"
    return None


def _percentile(times: list[float], percent: int) -> float:
    return sorted(times)[round((len(times) - 1) * percent / 100)]


def _time_ms(call: Callable[[], object], *, warmups: int = 5, repeats: int = 25) -> list[float]:
    """Milliseconds of single calls, by CUDA events."""
    for _ in range(warmups):
        call()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in marks:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in marks]
