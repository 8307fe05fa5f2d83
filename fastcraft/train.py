"""The main job: ``deepspeed fastcraft/train.py --ds_config ds_configs/zero2.json [--recipe NAME|FILE.toml] ...``.

Fine-tunes the text encoder of a Stable Diffusion model by rewards on its pictures. The step itself is
`fastcraft.objectives.reward_backprop`; `Trainer` below drives it through the ZeRO-2 engine.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from fastcraft.config import load_recipe, recipe_names
from fastcraft.errors import UserError

PREEMPTED = 143
"""Exit status after SIGTERM or SIGINT: one clean checkpoint has been written."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The whole command line; everything else is said in the recipe."""
    parser = argparse.ArgumentParser(
        prog="deepspeed fastcraft/train.py",
        description="Fine-tune the text encoder of a Stable Diffusion model by back-propagating image rewards.",
        epilog=f"Recipes that ship: {', '.join(recipe_names())}.",
        allow_abbrev=False,
    )
    parser.add_argument("--ds_config", required=True, metavar="FILE", help="DeepSpeed JSON, see ds_configs/")
    parser.add_argument("--recipe", default="shapes", metavar="NAME|FILE.toml", help="what to train (default: shapes)")
    parser.add_argument("--model", metavar="DIR|HUB_ID", help="Stable Diffusion 1.x/2.x; sets model.path")
    parser.add_argument("--prompts", metavar="FILE", help="txt, csv, tsv, json, jsonl or parquet; sets prompts.path")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE",
        help="change one value of the recipe; repeatable; rewards by index: rewards.0.weight=5",
    )  # fmt: skip
    parser.add_argument("--run-dir", metavar="DIR", help="where results go (default: the next free runs/RECIPE-NNN)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest good checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print plan and cost, then stop")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher passes it
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 training failed, 2 bad input (one line, no traceback), 143 preempted."""
    args = parse_args(argv)
    replaced = {"model.path": args.model, "prompts.path": args.prompts}
    try:
        recipe = load_recipe(
            args.recipe, args.overrides, {key: value for key, value in replaced.items() if value is not None}
        )
        from fastcraft.trainer import train  # torch and all that: only once the recipe holds

        return train(
            recipe,
            recipe_name=args.recipe,
            ds_config_path=args.ds_config,
            run_dir=args.run_dir,
            resume=args.resume,
            dry_run=args.dry_run,
        )
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"fastcraft: error: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
