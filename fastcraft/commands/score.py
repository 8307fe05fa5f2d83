"""``fastcraft score``: rewards of a folder of pictures, as a table, JSON and CSV."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcraft.commands.picture_file import read_picture, shown_name
from fastcraft.commands.pictures import Checked, batches, check_pictures, few, list_pictures
from fastcraft.commands.score_files import check_output, write_output
from fastcraft.commands.score_prompts import prompts_of
from fastcraft.commands.score_table import ScoreTable
from fastcraft.config import parse_value
from fastcraft.errors import UserError, named

if TYPE_CHECKING:
    import torch

    from fastcraft.rewards import RewardSpec
    from fastcraft.rewards.mix import WeightedRewards

HELP = "score a folder of pictures by rewards: a table, JSON and CSV"
_NOTES = "turned upright by EXIF, transparency on white, of several frames the first"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument(
        "--images", required=True, metavar="DIR", help=f"pictures, in the natural order of their names; {_NOTES}"
    )
    parser.add_argument(
        "--prompts", required=True, metavar="FILE",
        help="as many prompts, in the same order, an empty row counting as one; a column `file` names the pictures",
    )  # fmt: skip
    parser.add_argument("--rewards", required=True, metavar="A,B,C", help="names, see `fastcraft info --rewards`")
    parser.add_argument(
        "--set", action="append", default=[], dest="options", metavar="REWARD.KEY=VALUE",
        help="an option of a reward, or its path: hpsv2.path=/weights/HPS_v2_compressed.pt; repeatable",
    )  # fmt: skip
    parser.add_argument("--column", default="", help="column or key of the prompts in a csv, tsv, json or parquet file")
    parser.add_argument("--skip-bad", action="store_true", help="score the others when a picture cannot be read")
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
    """Score, print the table, write the files; exit status 1 if a score is not a finite number."""
    from fastcraft.rewards import REWARDS

    if args.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {args.batch_size}")
    specs = reward_specs(args.rewards, args.options)
    for spec in specs:
        REWARDS.get(spec.name)  # a mistyped name is said before the pictures are read
    folder = list_pictures(args.images)
    _check_outputs(args, inputs=[*folder.pictures, Path(args.prompts)])
    names, others = ([shown_name(file) for file in files] for files in (folder.pictures, folder.others))
    prompts, notes = prompts_of(args.prompts, names, column=args.column, others=few(others))
    checked = check_pictures(folder.pictures, skip_bad=args.skip_bad)
    rewards, device = _build(specs, args)
    for note in [*notes, *_notes(names, others, checked)]:
        _say(f"note: {note}")
    scores: dict[int, dict[str, float]] = {}
    try:
        _score(folder.pictures, prompts, rewards, scores, checked=checked, device=device, args=args)
    finally:  # whatever happened, what is scored by now is kept
        if scores:
            table = _table(names, prompts, scores, checked)
            _write(table, rewards, args)
    return _verdict(table)


def _check_outputs(args: argparse.Namespace, *, inputs: list[Path]) -> None:
    """Before anything is read or scored: ``--json`` and ``--csv`` can be written, and over nothing that is needed."""
    for flag, path in (("--json", args.json), ("--csv", args.csv)):
        if path is not None:
            check_output(path, flag=flag, others=inputs)
            inputs = [*inputs, Path(path)]


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
    for name, settings in given.items():
        path = settings.pop("path", "")
        if not isinstance(path, str):
            raise UserError(f"--set: path of {name!r} must be text, got {path!r}")
        specs.append(RewardSpec(name, path=path, options=settings))
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
    with named("--kernels: "):
        use_kernels(rewards.image_networks, backend=args.kernels, device=device)
    return rewards, device


def _score(
    files: Sequence[Path],
    prompts: Sequence[str],
    rewards: "WeightedRewards",
    scores: dict[int, dict[str, float]],
    *,
    checked: Checked,
    device: "torch.device",
    args: argparse.Namespace,
) -> None:
    """Fill ``scores``: every reward's score by picture; pictures of one size go together.

    Raises:
        UserError: a picture has gone bad since it was checked (with ``--skip-bad``: all have).
    """
    import torch
    from tqdm import tqdm

    with torch.inference_mode(), tqdm(total=len(checked.sizes), unit="picture", desc="scoring", disable=None) as bar:
        for indices in batches(checked.sizes, args.batch_size):
            images = {}
            for i in indices:
                try:
                    images[i] = read_picture(files[i])
                except UserError as error:
                    if not args.skip_bad:
                        raise
                    checked.bad[i] = str(error)
            if images:
                batch = torch.stack(list(images.values())).to(device)
                parts = rewards(batch, [prompts[i] for i in images]).parts
                columns = {name: values.tolist() for name, values in parts.items()}
                for place, i in enumerate(images):
                    scores[i] = {name: column[place] for name, column in columns.items()}
            bar.update(len(indices))
    if not scores:
        raise UserError(next(iter(checked.bad.values())))


def _table(
    names: Sequence[str], prompts: Sequence[str], scores: dict[int, dict[str, float]], checked: Checked
) -> ScoreTable:
    order = sorted(scores)
    missing = {i: checked.bad.get(i, "the run ended before it") for i in range(len(names)) if i not in scores}
    return ScoreTable(
        files=[names[i] for i in order],
        prompts=[prompts[i] for i in order],
        scores={reward: [scores[i][reward] for i in order] for reward in scores[order[0]]},
        notes=[checked.notes.get(i, []) for i in order],
        skipped={names[i]: reason for i, reason in missing.items()},
    )


def _write(table: ScoreTable, rewards: "WeightedRewards", args: argparse.Namespace) -> None:
    """The files, and the table even when they cannot be written."""
    try:
        if args.json is not None:
            write_output(args.json, table.json(settings=rewards.settings), flag="--json")
        if args.csv is not None:
            write_output(args.csv, table.csv(), flag="--csv")
    finally:
        encoding = sys.stdout.encoding or "utf-8"  # a terminal may lack the letters of a name
        print(table.text().encode(encoding, errors="backslashreplace").decode(encoding), flush=True)
        for name, counts in rewards.counts.items():
            print(f"{name}: " + ", ".join(f"{number} {what}" for what, number in counts.items()))
        for name, reason in table.skipped.items():
            _say(f"warning: {name} is not scored: {reason}")


def _verdict(table: ScoreTable) -> int:
    """Exit status; a score that is not a finite number is said."""
    not_finite = table.not_finite()
    for name, files in not_finite.items():
        _say(f"warning: {len(files)} of {len(table.files)} scores of {name} are not finite numbers: {few(files)}")
    return 1 if not_finite else 0


def _notes(names: Sequence[str], others: Sequence[str], checked: Checked) -> list[str]:
    """What is not read, and what was done to pictures, with the names of those it was done to."""
    by_note: dict[str, list[str]] = {"no pictures by their names, so not read": list(others)}
    for i, notes in checked.notes.items():
        for note in notes:
            by_note.setdefault(note, []).append(names[i])
    return [f"--images: {note}: {few(files)}" for note, files in by_note.items() if files]


def _say(message: str) -> None:
    print(f"fastcraft: {message}", file=sys.stderr, flush=True)
