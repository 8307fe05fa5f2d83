"""``fastcraft info``: facts about what is installed and what is on disk, one topic for each flag."""

import argparse
import importlib

from fastcraft.errors import UserError

HELP = "Print facts: --rewards lists the rewards, their files and where they are looked for."
TOPICS = {"rewards": "fastcraft.commands.info_rewards"}
"""Flag -> module with ``add_arguments(parser)``, which adds that flag, and ``run(args) -> exit status``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every topic."""
    for path in TOPICS.values():
        importlib.import_module(path).add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Every topic that was asked for, in order; the largest exit status."""
    asked = [path for flag, path in TOPICS.items() if getattr(args, flag)]
    if not asked:
        raise UserError(f"info: one of {', '.join('--' + flag for flag in TOPICS)} is required, got none")
    return max(importlib.import_module(path).run(args) for path in asked)
