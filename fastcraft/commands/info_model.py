"""``fastcraft info --model``: what the fused ops replace in a model, what they leave alone and why."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flag."""
    parser.add_argument(
        "--model", metavar="DIR", help="which fused op runs where in a diffusers folder (or shapes), and why"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table; only configs are read."""
    print(describe_model(args.model))
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
