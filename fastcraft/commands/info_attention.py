"""``fastcraft info --measure-attention``: which attention is fastest on this GPU."""

import argparse
from pathlib import Path

from fastcraft.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flag, and where its result goes."""
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
    """Measure, write, print."""
    print(measure(args.out or Path("attention_table.json")))
    return 0


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
