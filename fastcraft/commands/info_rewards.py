"""``fastcraft info --rewards``: every reward, what it gives, and where its files are looked for."""

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flag."""
    parser.add_argument("--rewards", action="store_true", help="every reward, its range, its files and where they are")


def run(args: argparse.Namespace) -> int:
    """Print the table; nothing is loaded or downloaded."""
    from fastcraft.rewards import REWARDS

    rows = [("reward", "gradient", "reads prompt", "range")]
    classes = {name: REWARDS.get(name) for name in REWARDS.names()}
    for name, reward in classes.items():
        rows.append((name, _gradient(name, reward), "yes" if reward.uses_prompt else "no", reward.score_range))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]))
    print(
        "\nAll files, when path is empty; path takes a local file or folder, or a hub id, and tokenizer_path likewise:"
    )
    for name, reward in classes.items():
        for released in reward.files:
            cached = released.cached()
            state = f"found: {cached}" if cached else f"not in {released.cache_folder()}"
            instead = f" (or {' and '.join(released.instead)})" if released.instead else ""
            print(f"  {name:<12} {released.name}{instead} from {released.origin}\n  {'':<12} {state}")
    return 0


def _gradient(name: str, reward: Any) -> str:
    """Whether it has one; a user's function says so itself."""
    if name == "callable":
        return "if stated"
    return "yes" if reward.differentiable else "no"
