"""The whole Stable Diffusion 1.5 UNet, forward and gradient to the text: ``python -m benchmarks.unet [--out FILE]``.

Random weights at full size, bfloat16, text keys and values projected once, as in a training step. Every contender runs
in a process of its own, one after the other, so that its peak memory is its own; on CUDA each is timed twice, as called
and replayed from a CUDA graph. ``--small`` rehearses on a machine without a GPU.

Contenders: ``eager`` is diffusers' modules channels-last with SDPA; ``compile`` the same under torch.compile;
``patched`` this project's ops; ``patched+compile`` both.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

CONTENDERS = ("eager", "compile", "patched", "patched+compile")
FULL = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SMALL = {
    "sample_size": 16, "cross_attention_dim": 32, "attention_head_dim": 1, "block_out_channels": (40, 80, 160, 160),
    "layers_per_block": 1, "norm_num_groups": 8,
}  # fmt: skip
TEXT_LENGTH = 77


def measure(contender: str, batch: int, *, small: bool, rounds: int, attention_table: Path | None) -> dict[str, Any]:
    """One contender in this process: seconds of forward and gradient, and the peak of device memory."""
    from diffusers import UNet2DConditionModel

    from fastcraft.diffusion.patch import Patch
    from fastcraft.families.components import freeze
    from fastcraft.families.unet import UNetNetwork, use_text_kv
    from fastcraft.records import PromptEmbeds, TextEmbeds
    from fastcraft_kernels.attention import load_attention_table

    load_attention_table(attention_table)
    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    config = SMALL if small else FULL
    torch.manual_seed(0)
    with device:
        unet = freeze(UNet2DConditionModel(**config))
    torch.nn.Module.to(unet, dtype=dtype, memory_format=torch.channels_last)
    use_text_kv(unet)
    size = config["sample_size"]
    latents = torch.randn(batch, 4, size, size, device=device).to(dtype)
    text = torch.randn(batch, TEXT_LENGTH, config["cross_attention_dim"], device=device).to(dtype).requires_grad_()
    cotangent = torch.randn_like(latents)
    timestep = torch.tensor(500, device=device)
    network = torch.compile(unet) if contender.endswith("compile") else unet

    def step() -> Any:
        kwargs = {"conditioning": UNetNetwork(module=unet).condition(PromptEmbeds(cond=TextEmbeds(sequence=text)))}
        output = network(latents, timestep, None, cross_attention_kwargs=kwargs, return_dict=False)[0]
        return torch.autograd.grad(output, text, cotangent)

    with Patch(unet) if contender.startswith("patched") else nullcontext():
        for _ in range(3):
            step()
        row = {"contender": contender, "batch": batch, "rounds": rounds, "seconds_20_50_80": _times(step, rounds, cuda)}
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            torch.cuda.synchronize()
            row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
            row["peak_above_weights_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
            row |= _graph_times(step, rounds)
    return row


def _times(step: Callable[[], Any], rounds: int, cuda: bool) -> list[float]:
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return [statistics.quantiles(seconds, n=10)[i] for i in (1, 4, 7)]


def _graph_times(step: Callable[[], Any], rounds: int) -> dict[str, Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        return {"graph_refused": str(error).splitlines()[0][:200]}
    return {"graph_seconds_20_50_80": _times(graph.replay, rounds, True)}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; ratios are to the first contender of the same batch."""
    lines = [
        "| N | contender | ms (20/50/80 %) | ratio | graph ms | ratio | peak MiB | above weights |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        first = next(r for r in rows if r["batch"] == row["batch"])
        cells = []
        for key in ("seconds_20_50_80", "graph_seconds_20_50_80"):
            if key not in row:
                cells += [row.get("graph_refused", "-"), "-"]
                continue
            cells.append(" / ".join(f"{1e3 * value:.1f}" for value in row[key]))
            cells.append(f"{first[key][1] / row[key][1]:.2f}x" if key in first else "-")
        cells += [f"{row[key]:.0f}" if key in row else "-" for key in ("peak_mib", "peak_above_weights_mib")]
        lines.append(f"| {row['batch']} | {row['contender']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure every contender, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[2, 16], help="rows of the UNet's batch")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--rounds", type=int, default=20, help="timed steps, at least 2")
    parser.add_argument("--small", action="store_true", help="a narrow UNet, to rehearse without a GPU")
    parser.add_argument("--attention-table", type=Path, help="what ``fastcraft info --measure-attention`` wrote")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # the process of one contender
    args = parser.parse_args()
    if args.one:
        row = measure(
            args.contenders[0], args.batches[0], small=args.small, rounds=args.rounds,
            attention_table=args.attention_table,
        )  # fmt: skip
        print(json.dumps(row))
        return
    from fastcraft.evaluation.environment import environment

    rows = []
    for batch in args.batches:
        for contender in args.contenders:
            command = [sys.executable, "-m", "benchmarks.unet", "--one", "--contenders", contender]
            command += ["--batches", str(batch), "--rounds", str(args.rounds), *(["--small"] if args.small else [])]
            command += [] if args.attention_table is None else ["--attention-table", str(args.attention_table)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"benchmarks.unet: {contender} at N = {batch} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
                continue
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    print(table(rows))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"rows": rows, "small": args.small, "environment": environment()}, indent=1))


if __name__ == "__main__":
    main()
