"""``fastcraft info``: what the fused ops replace in a model, what they leave alone and why."""

import argparse
from pathlib import Path

from fastcraft.errors import UserError

NAME = "info"
HELP = "say which fused op runs in which module of a model, and why others are left; measure attention"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("--model", metavar="DIR", help='a diffusers folder, or "shapes" for the bundled model')
    parser.add_argument(
        "--measure-attention", action="store_true", help="time every attention on this GPU and write the dispatch table"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where --measure-attention writes its table (default: attention_table.json)",
    )


def run(args: argparse.Namespace) -> int:
    """Exit status 0."""
    if args.model is None and not args.measure_attention:
        raise UserError("info: give --model DIR, --measure-attention, or both")
    if args.out is not None and not args.measure_attention:
        raise UserError(f"info: --out needs --measure-attention, got {str(args.out)!r} alone")
    if args.model is not None:
        print(describe_model(args.model))
    if args.measure_attention:
        print(measure(args.out or Path("attention_table.json")))
    return 0


def describe_model(model: str) -> str:
    """A table of every module that a rule knows, read from the configs alone."""
    import torch

    from fastcraft.assemble import SHAPES
    from fastcraft.diffusion.components import load_skeletons
    from fastcraft.diffusion.patch import Patch
    from fastcraft_kernels.backend import triton_refusal

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refusal = triton_refusal(device, torch.bfloat16)
    patch = Patch(*load_skeletons(SHAPES / "weights" / "pipeline" if model == "shapes" else model))
    lines = [f"kernels    {'Triton' if refusal is None else f'none on this machine: {refusal}'}"]
    for name, swaps, summary in zip(("unet", "vae"), patch.swaps, patch.summary().splitlines(), strict=True):
        lines += ["", summary]
        rows = [(f"{name}.{swap.module}", swap.kind, swap.ops or f"left: {swap.reason}") for swap in swaps]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines += [f"  {module:<{widths[0]}}  {kind:<{widths[1]}}  {what}" for module, kind, what in rows]
    return "\n".join(lines)


def measure(out: Path) -> str:
    """Time every provider of self-attention on this GPU and write the table that ``kernels.attention_table`` reads."""
    from fastcraft_kernels.attention import measure_attention

    if not out.absolute().parent.is_dir():
        raise UserError(f"info: --out: no folder {str(out.absolute().parent)!r}")
    try:
        rows = measure_attention(out)["rows"]
    except ValueError as error:
        raise UserError(f"info: --measure-attention: {error}") from error
    lines = [f"{'head':>5} {'tokens':>7}  {'direction':<9}  {'fastest':<10}  milliseconds of all"]
    for row in rows:
        times = ", ".join(f"{name} {value:.3f}" for name, value in sorted(row["milliseconds"].items()))
        refused = "".join(f"; {name} refused: {reason}" for name, reason in row["refused"].items())
        lines.append(
            f"{row['head_dim']:>5} {row['sequence']:>7}  {row['direction']:<9}  {row['provider']:<10}  {times}{refused}"
        )
    return "\n".join([*lines, f"written to {out}; --set kernels.attention_table={out} uses it"])
