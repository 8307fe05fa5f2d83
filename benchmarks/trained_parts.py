"""What it costs to train a UNet beside or instead of its text encoder: ``python -m benchmarks.trained_parts``.

``bytes``: of Stable Diffusion 1.5 at full size and in bfloat16, counted on the meta device: nothing is computed, no
weights are needed. What one guided denoising step with gradient holds from its forward to its backward for one sample
(``held``; ``first``: of a step whose latents carry no gradient), its highest point above the weights, and what ZeRO-2
keeps of the trained parts on each card. ``time``: processor time of one micro-step, forward and backward, on the
bundled model in one process, the rows taking turns.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastcraft.diffusion.patch import Patch
from fastcraft.families.unet import UNetNetwork, use_text_kv
from fastcraft.forecast.architectures import MODELS
from fastcraft.forecast.cost import measure_step
from fastcraft.forecast.networks import Networks, networks_from_configs
from fastcraft.forecast.phases import _card_attention, _Forecast
from fastcraft.records import PromptEmbeds, TextEmbeds
from fastcraft.trained.lora import UNET_CONV_TARGETS, UNET_LINEAR_TARGETS, UNET_TARGETS, inject_lora

RESULTS = Path(__file__).parent / "results" / "trained_parts"
PARTS: dict[str, tuple[str, ...] | None] = {
    "text": (),
    "UNet, LoRA on attention": UNET_TARGETS,
    "UNet, LoRA on all linear": UNET_LINEAR_TARGETS,
    "UNet, LoRA on linear and convolutions": UNET_CONV_TARGETS,
    "UNet, whole": None,
}
"""What is trained: of the UNet these layers, by adapters of rank 16; none, and the text whole; or all of it."""
KINDS = ("plain", "patched", "patched, inputs kept")
STATES = ("trained weights", "masters and moments", "averages", "gradient bucket")
LORA = ("trained.unet.mode=lora", "trained.unet.rank=16", "trained.unet.alpha=16", "trained.unet.learning_rate=1e-4")
FROZEN = ("trained.text.mode=none",)
PATCHED = ("kernels.backend=reference",)


def networks(part: str) -> Networks:
    """Stable Diffusion 1.5 without weights, with one of `PARTS` trained."""

    def prepare(unet: Any) -> None:
        targets = PARTS[part]
        if targets is None:
            unet.requires_grad_(True)
        elif targets:
            inject_lora(unet, rank=16, alpha=16, targets=targets)
        use_text_kv(unet)

    with mock.patch("fastcraft.forecast.networks.use_text_kv", prepare):
        found = networks_from_configs("sd15", MODELS["sd15"], towers=[], dtype=torch.bfloat16)
    for encoder in found.text_encoders:
        encoder.requires_grad_(part == "text")
    return found


@contextlib.contextmanager
def kept_inputs() -> Iterator[None]:
    """Layers keep what they read, as they would without `fastcraft.remade`."""
    with contextlib.ExitStack() as stack:
        for module in ("fused_forwards", "fused_attention"):
            stack.enter_context(mock.patch(f"fastcraft.diffusion.{module}.remakeable", lambda out, *_: out))
        yield


def guided_step(unet: Any) -> tuple[Callable[[Tensor], Tensor], Tensor, list[Tensor]]:
    """A guided prediction for one sample, the latents to call it with, and what is there before it.

    Inside the patch with which it runs: fused layers take the text otherwise.
    """
    network, time_ = UNetNetwork(module=unet), torch.empty((), device="meta", dtype=torch.long)
    cond, uncond = (torch.empty(1, 77, 768, device="meta", dtype=unet.dtype, requires_grad=True) for _ in range(2))
    keys = network.condition(PromptEmbeds(cond=TextEmbeds(sequence=cond), uncond=TextEmbeds(sequence=uncond)))
    keys = keys.unflatten([tensor.detach().requires_grad_() for tensor in keys.flat()])
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)

    def step(latents: Tensor) -> Tensor:
        for tensor in keys.flat():
            tensor.grad = None
        return network.predict(latents, time_, keys, guided=True)

    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    latents = torch.empty(1, 4, 64, 64, device="meta")
    return step, latents, [*unet.parameters(), *unet.buffers(), *keys.flat(), *gradients]


def count_bytes() -> dict[str, dict[str, dict[str, float]]]:
    """``{"plain": {part: figures}, "patched": ..., "patched, inputs kept": ...}``; of one step, in MiB."""
    results: dict[str, dict[str, dict[str, float]]] = {}
    for kind in KINDS:
        for part in PARTS:
            unet = networks(part).unet
            with contextlib.ExitStack() as stack:
                stack.enter_context(_card_attention() if kind == "plain" else Patch(unet))
                if kind == "patched, inputs kept":
                    stack.enter_context(kept_inputs())
                step, latents, weights = guided_step(unet)
                cost = measure_step(step, latents, weights=weights)
            assert cost.first_held is not None
            results.setdefault(kind, {})[part] = {
                "held_mib": cost.held.each / 2**20,
                "first_mib": cost.first_held.each / 2**20,
                "highest_mib": (cost.held.each + cost.backward_extra.each) / 2**20,
                "tflop": cost.flops / 1e12,
            }
            print(f"{kind}: {part}: {results[kind][part]}", file=sys.stderr, flush=True)
    return results


def states_gb(part: str, ranks: int) -> float:
    """What one of so many cards has of the trained parts while the optimiser runs, in 10**9 bytes."""
    static, update, gradients = _Forecast(networks(part), guided=True, device="meta")._static(ranks)
    return (sum(size for kind, size in static.items() if kind.startswith(STATES)) + update + gradients) / 1e9


@dataclass(frozen=True, kw_only=True)
class Row:
    """A micro-step that is timed: its ``name``, and what its recipe says besides."""

    name: str
    overrides: tuple[str, ...] = ()
    kept: bool = False


ROWS = (
    Row(name="text"),
    Row(name="UNet, LoRA on attention", overrides=(*FROZEN, *LORA)),
    Row(name="text and UNet, LoRA on attention", overrides=LORA),
    Row(name="text, patched", overrides=PATCHED),
    Row(name="UNet, LoRA on attention, patched", overrides=(*FROZEN, *LORA, *PATCHED)),
    Row(name="the same, inputs kept", overrides=(*FROZEN, *LORA, *PATCHED), kept=True),
)
"""The first of a kind, plain or patched, is what the others of it are compared with."""


def micro_step(row: Row, overrides: list[str]) -> Callable[[int], float]:
    """From a number to the processor seconds of that micro-step."""
    from fastcraft.build.run import build_objective, build_run
    from fastcraft.config import load_recipe

    recipe = load_recipe("shapes", [*overrides, *row.overrides])
    parts = build_run(recipe, device=torch.device("cpu"))
    trained = parts.model.trained
    objective = build_objective(recipe, parts, parts.model.through(trained))

    def run(number: int) -> float:
        trained.zero_grad(set_to_none=True)
        with kept_inputs() if row.kept else contextlib.nullcontext():
            began = time.process_time()
            for loss in objective.round(number):
                loss.loss.backward()
            return time.process_time() - began

    return run


def measure_time(overrides: list[str], *, rounds: int) -> dict[str, Any]:
    """Medians of all rows, and what they are of the first of their kind."""
    steps = {row.name: micro_step(row, overrides) for row in ROWS}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            seconds[name].append(step(number))
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    bases = {row.name: "text, patched" if set(PATCHED) <= {*row.overrides} else "text" for row in ROWS}
    return {
        "overrides": overrides, "rounds": rounds, "threads": torch.get_num_threads(),
        "rows": {
            name: {"median": medians[name], "ratio": medians[name] / medians[bases[name]], "seconds": values[1:]}
            for name, values in seconds.items()
        },
    }  # fmt: skip


def markdown(results: dict[str, Any]) -> str:
    """Tables of what was counted and of what was timed."""
    lines = ["# Training a UNet beside or instead of its text encoder", "", (__doc__ or "").split("\n\n", 1)[1].strip()]
    for kind, rows in results.get("bytes", {}).items():
        lines += ["", f"Stable Diffusion 1.5, {kind}:", ""]
        lines += [
            "| trained | held, MiB | against text | first, MiB | highest, MiB | TFLOP |",
            "|---|---|---|---|---|---|",
        ]
        for part, row in rows.items():
            more = row["held_mib"] / rows["text"]["held_mib"] - 1
            cells = [part, f"{row['held_mib']:.1f}", f"{more:+.1%}", f"{row['first_mib']:.1f}"]
            cells += [f"{row['highest_mib']:.1f}", f"{row['tflop']:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    if states := results.get("states"):
        lines += ["", "ZeRO-2 states of the trained parts, GB (10**9 bytes):", ""]
        lines += ["| trained | one card | each of eight |", "|---|---|---|"]
        lines += [f"| {part} | {gb['1']:.2f} | {gb['8']:.2f} |" for part, gb in states.items()]
    if timed := results.get("time"):
        lines += ["", f"Bundled model, {', '.join(timed['overrides'])}; {timed['rounds']} rounds, seconds:", ""]
        lines += ["| trained | median (smallest, largest) | against text of its kind |", "|---|---|---|"]
        for name, row in timed["rows"].items():
            spread = f"{row['median']:.3f} ({min(row['seconds']):.3f}, {max(row['seconds']):.3f})"
            lines.append(f"| {name} | {spread} | {row['ratio']:.2f}x |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Count, time, or both; what the folder has of the other half stays."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("halves", nargs="*", default=["bytes", "time"], help="bytes, time or both (the default)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args()
    file = args.out / "trained_parts.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    results["torch"] = torch.__version__
    if "bytes" in args.halves:
        results["bytes"] = count_bytes()
        results["states"] = {part: {str(ranks): states_gb(part, ranks) for ranks in (1, 8)} for part in PARTS}
    if "time" in args.halves:
        sizes = ["train.batch_size=4", "sampler.num_inference_steps=6", "objective.backprop_steps=3"]
        results["time"] = measure_time([*sizes, *args.overrides], rounds=args.rounds)
    args.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "README.md").write_text(markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
