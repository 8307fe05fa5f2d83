"""``fastcraft score``: rewards of a folder of pictures, as a table, JSON and CSV."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcraft.commands.pictures import batches, list_pictures, read_picture
from fastcraft.commands.score_table import ScoreTable
from fastcraft.config import parse_value
from fastcraft.errors import UserError

if TYPE_CHECKING:
    import torch

    from fastcraft.rewards import RewardSpec
    from fastcraft.rewards.mix import WeightedRewards

HELP = "score a folder of pictures by rewards: a table, JSON and CSV"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--images", required=True, metavar="DIR", help="pictures, in the natural order of their names")
    parser.add_argument("--prompts", required=True, metavar="FILE", help="as many prompts, in the same order")
    parser.add_argument("--rewards", required=True, metavar="A,B,C", help="names, see `fastcraft info --rewards`")
    parser.add_argument(
        "--set", action="append", default=[], dest="options", metavar="REWARD.KEY=VALUE",
        help="an option of a reward, or its path: hpsv2.path=/weights/HPS_v2_compressed.pt; repeatable",
    )  # fmt: skip
    parser.add_argument("--column", default="", help="column or key of the prompts in a csv, tsv, json or parquet file")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="pictures at once (default: 8)")
    parser.add_argument("--device", default="", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the towers")
    parser.add_argument(
        "--kernels", choices=["auto", "triton", "reference"], default="auto",
        help="who computes the image towers, as kernels.backend of a recipe (default: auto, fused ops on cuda)",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="every score, and the settings they must be quoted with")
    parser.add_argument("--csv", metavar="FILE", help="one line for each picture")


def run(args: argparse.Namespace) -> int:
    """Score, print the table, write the files."""
    if args.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {args.batch_size}")
    for flag in ("json", "csv"):
        if (path := getattr(args, flag)) and not Path(path).absolute().parent.is_dir():
            raise UserError(f"--{flag}: the folder of {path!r} must exist")
    from fastcraft.data.prompts import load_prompts

    files = list_pictures(args.images)
    prompts = list(load_prompts(args.prompts, column=args.column).prompts)
    if len(prompts) != len(files):
        raise UserError(f"--prompts: one for each of the {len(files)} pictures is needed, got {len(prompts)}")
    rewards, device = _build(reward_specs(args.rewards, args.options), args)
    scores = _score(files, prompts, rewards, device=device, batch_size=args.batch_size)
    table = ScoreTable(files=[file.name for file in files], prompts=prompts, scores=scores)
    print(table.text())
    for name, counts in rewards.counts.items():
        print(f"{name}: " + ", ".join(f"{number} {what}" for what, number in counts.items()))
    if args.json:
        Path(args.json).write_text(table.json(settings=rewards.settings), encoding="utf-8")
    if args.csv:
        Path(args.csv).write_text(table.csv(), encoding="utf-8", newline="")
    return 0


def reward_specs(names: str, options: Sequence[str]) -> "list[RewardSpec]":
    """From ``a,b`` and ``a.key=value``; names may hold dots (hpsv2.1), keys do not.

    Raises:
        UserError: no name, one twice, or an option that belongs to none of them.
    """
    from fastcraft.rewards import RewardSpec

    listed = [name.strip() for name in names.split(",") if name.strip()]
    if not listed:
        raise UserError(f"--rewards: at least one name is required, got {names!r}")
    for name in listed:
        if listed.count(name) > 1:
            raise UserError(f"--rewards: each name once, got {name!r} {listed.count(name)} times")
    given: dict[str, dict[str, Any]] = {name: {} for name in listed}
    for item in options:
        left, equals, text = item.partition("=")
        name, dot, key = left.strip().rpartition(".")
        if not equals or not dot or name not in given:
            raise UserError(f"--set: expected REWARD.KEY=VALUE with a reward of --rewards, got {item!r}")
        given[name][key] = parse_value(text.strip())
    specs = []
    for name, own in given.items():
        path = own.pop("path", "")
        if not isinstance(path, str):
            raise UserError(f"--set: path of {name!r} must be text, got {path!r}")
        specs.append(RewardSpec(name, path=path, options=own))
    return specs


def _build(specs: "list[RewardSpec]", args: argparse.Namespace) -> "tuple[WeightedRewards, torch.device]":
    import torch
    from transformers.utils.logging import disable_progress_bar

    from fastcraft.diffusion.use_kernels import use_kernels
    from fastcraft.rewards import build_rewards
    from fastcraft.rewards.clip_tower import Towers

    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    disable_progress_bar()
    bundled = Path(__file__).parents[1] / "shapes" / "weights" / "reward"
    towers = Towers(device=device, dtype=getattr(torch, args.dtype), bundled=bundled)
    rewards = build_rewards(specs, towers=towers, require_grad=False)
    use_kernels(rewards.image_networks, backend=args.kernels, device=device)
    return rewards, device


def _score(
    files: Sequence[Path],
    prompts: Sequence[str],
    rewards: "WeightedRewards",
    *,
    device: "torch.device",
    batch_size: int,
) -> Mapping[str, list[float]]:
    """Every reward's score of every picture; pictures of one size go together."""
    import torch
    from tqdm import tqdm

    scores: dict[str, list[float]] = {name: [0.0] * len(files) for name in rewards.names}
    with torch.inference_mode(), tqdm(total=len(files), unit="picture", desc="scoring") as bar:
        for indices in batches(files, batch_size):
            images = torch.stack([read_picture(files[i]) for i in indices]).to(device)
            parts = rewards(images, [prompts[i] for i in indices]).parts
            for name, values in parts.items():
                for i, value in zip(indices, values.tolist(), strict=True):
                    scores[name][i] = value
            bar.update(len(indices))
    return scores
