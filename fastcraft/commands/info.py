"""``fastcraft info``: facts about what is installed and what is on disk, one topic for each flag."""

import argparse
import importlib

from fastcraft.errors import UserError

HELP = "print facts: the rewards and their files, what the fused ops replace in a model; measure attention"
TOPICS = {
    "rewards": "fastcraft.commands.info_rewards",
    "model": "fastcraft.commands.info_model",
    "measure_attention": "fastcraft.commands.info_attention",
}
"""Flag -> module with ``add_arguments(parser)``, which adds that flag, and ``run(args) -> exit status``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every topic."""
    for path in TOPICS.values():
        importlib.import_module(path).add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Every topic that was asked for, in order; the largest exit status."""
    asked = [path for flag, path in TOPICS.items() if getattr(args, flag)]
    if args.out is not None and not args.measure_attention:
        raise UserError(f"info: --out needs --measure-attention, got {str(args.out)!r} alone")
    if not asked:
        flags = ", ".join("--" + flag.replace("_", "-") for flag in TOPICS)
        raise UserError(f"info: one of {flags} is required, got none")
    return max(importlib.import_module(path).run(args) for path in asked)
