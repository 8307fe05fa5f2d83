"""``fastcraft info --model``: what the fused ops replace in a model, what they leave alone and why."""

import argparse
from pathlib import Path
from typing import Any

from fastcraft.errors import named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flag."""
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="which fused op runs where, and why not: a diffusers folder, a reward's CLIP folder or file of weights, "
        "or shapes",
    )


def run(args: argparse.Namespace) -> int:
    """Print the table; of folders only configs are read."""
    print(describe_model(args.model))
    return 0


def describe_model(model: str) -> str:
    """A table of every module that a rule knows."""
    import torch

    from fastcraft.diffusion.patch import Patch
    from fastcraft_kernels.backend import triton_refusal

    networks = _networks(model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refusal = triton_refusal(device, torch.bfloat16)
    patch = Patch(*networks.values())
    lines = [f"kernels    {'Triton' if refusal is None else f'none on this machine: {refusal}'}"]
    for name, swaps, summary in zip(networks, patch.swaps, patch.summary().splitlines(), strict=True):
        lines += ["", summary]
        rows = [(f"{name}.{swap.module}", swap.kind, swap.ops or f"left: {swap.reason}") for swap in swaps]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines += [f"  {module:<{widths[0]}}  {kind:<{widths[1]}}  {what}" for module, kind, what in rows]
    return "\n".join(lines)


def _networks(model: str) -> dict[str, Any]:
    """By the name that they have in a run: UNet and VAE, the image tower of a reward, or all three of ``shapes``."""
    from fastcraft.families.components import load_skeletons
    from fastcraft.rewards.skeleton import image_skeleton
    from fastcraft.shapes import PIPELINE, REWARD

    path = Path(model).expanduser()
    if model != "shapes" and path.exists() and not (path / "unet").is_dir():
        return {"reward": image_skeleton(path)}
    with named("--model: "):
        networks = dict(zip(("unet", "vae"), load_skeletons(PIPELINE if model == "shapes" else path), strict=True))
    if model == "shapes":
        networks["reward"] = image_skeleton(REWARD)
    return networks
