"""The main job: ``deepspeed fastcraft/train.py --ds_config ds_configs/zero2.json [--recipe NAME|FILE.toml] ...``.

Fine-tunes the text encoder of a Stable Diffusion model by rewards on its pictures. This file reads the command line and
puts a run together; the loop is `fastcraft.trainer`, the step `fastcraft.objectives.reward_backprop`.
"""

import argparse
import contextlib
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcraft.config import dump_recipe, load_recipe, recipe_names
from fastcraft.errors import CommandLine, UserError
from fastcraft.recipe import Recipe

if TYPE_CHECKING:  # what takes long to import is imported only once the recipe holds
    from torch import Tensor

    from fastcraft.build.run import Parts
    from fastcraft.engine.interrupt import Interrupt
    from fastcraft.engine.zero2 import Zero2Engine
    from fastcraft.evaluation.record import RunRecord
    from fastcraft.trainer import Trainer


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The whole command line; everything else is said in the recipe."""
    parser = CommandLine(
        prog="deepspeed fastcraft/train.py",
        description="Fine-tune the text encoder of a Stable Diffusion model by back-propagating image rewards.",
        epilog=f"Recipes that ship: {', '.join(recipe_names())}. "
        "Exit status: 0 done, 1 training failed, 2 bad input, 143 stopped on request after a clean checkpoint.",
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
    """Exit status: 0 done, 1 training failed, 2 bad input (one line, no traceback), 143 stopped on request."""
    args = parse_args(argv)
    replaced = {"model.path": args.model, "prompts.path": args.prompts}
    try:
        recipe = load_recipe(args.recipe, args.overrides, {key: v for key, v in replaced.items() if v is not None})
        return train(recipe, args)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"fastcraft: error: {error}", file=sys.stderr, flush=True)
        return 2


def train(recipe: Recipe, args: argparse.Namespace) -> int:
    """Check everything, then run; nothing is written before all input is known to be good."""
    _quiet_libraries()
    import torch

    from fastcraft.build.run import build_run
    from fastcraft.engine.agreement import close_distributed, rank
    from fastcraft.engine.ds_config import load_ds_config
    from fastcraft.engine.interrupt import PREEMPTED_EXIT_CODE, StopRequested
    from fastcraft.engine.zero2 import init_distributed
    from fastcraft.trainer import TrainingFailed
    from fastcraft.weights.report import ExportError

    ds_config = load_ds_config(args.ds_config)
    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    parts = build_run(recipe, device=device)
    ds_config = _fill(ds_config, recipe, parts)
    if args.dry_run:
        return _dry_run(recipe, args, parts)
    opened = init_distributed(device.type)
    status, message = 0, ""
    try:
        _run(recipe, args, parts, ds_config)
    except (TrainingFailed, ExportError) as error:
        status, message = 1, f"training failed: {error}"
    except StopRequested as reason:
        status, message = PREEMPTED_EXIT_CODE, f"stopped ({reason}); go on with --resume"
    finally:
        if message and rank() == 0:
            print(f"fastcraft: {message}", file=sys.stderr, flush=True)
        if opened:
            close_distributed()
    return status


def _quiet_libraries() -> None:
    """No loading bars, and no word about xformers' CUDA extensions on a machine without CUDA."""
    logging.getLogger("xformers").setLevel(logging.ERROR)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def _fill(ds_config: dict[str, Any], recipe: Recipe, parts: "Parts") -> dict[str, Any]:
    """The DeepSpeed config with its "auto" values taken from the recipe and the model."""
    from fastcraft.engine.ds_config import fill_ds_config

    sizes = [parameter.numel() for parameter in parts.model.trained.parameters() if parameter.requires_grad]
    options = recipe.train
    return fill_ds_config(
        ds_config,
        batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        dtype=options.dtype,
        max_grad_norm=options.max_grad_norm,
        learning_rate=options.learning_rate,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        num_parameters=sum(sizes),
        largest_parameter=max(sizes),
    )


def _dry_run(recipe: Recipe, args: argparse.Namespace, parts: "Parts") -> int:
    from fastcraft.dry_run import describe
    from fastcraft.engine.run_directory import check_run_dir, choose_run_dir

    run_dir = choose_run_dir(args.run_dir, recipe_name=args.recipe, resume=args.resume)
    check_run_dir(run_dir, recipe, resume=args.resume)
    if os.environ.get("RANK", "0") == "0":
        print(describe(recipe, parts, world_size=int(os.environ.get("WORLD_SIZE", "1"))))
    return 0


def _run(recipe: Recipe, args: argparse.Namespace, parts: "Parts", ds_config: dict[str, Any]) -> None:
    """The run itself, on every rank."""
    from fastcraft.engine.agreement import agree, from_rank_zero, rank, world_size
    from fastcraft.engine.checkpoint import load_checkpoint
    from fastcraft.engine.interrupt import Interrupt
    from fastcraft.evaluation.record import RunRecord

    options = recipe.train
    engine = _engine(recipe, parts, ds_config)
    with contextlib.ExitStack() as stack:
        run_dir, newest, notes = from_rank_zero(lambda: _prepare(recipe, args, stack))
        if any(agree([not (run_dir / "recipe.toml").is_file()])):
            raise UserError(f"--run-dir: {str(run_dir)!r} must lie on a file system that every node sees")
        checkpoint = load_checkpoint(newest, rank=rank(), world_size=world_size()) if newest else None
        interrupt = Interrupt()
        stack.callback(interrupt.restore)
        record = None
        if rank() == 0:
            record = stack.enter_context(
                RunRecord(
                    run_dir,
                    num_steps=options.num_steps,
                    total_samples_per_step=options.batch_size * options.gradient_accumulation_steps * world_size(),
                    resume_step=checkpoint.step if checkpoint else None,
                )
            )
        trainer = _trainer(recipe, parts, engine, run_dir=run_dir, interrupt=interrupt, record=record)
        for note in filter(None, (parts.prompts.summary, parts.acceleration, *notes)):
            trainer.say(note)
        if checkpoint is not None:
            trainer.restore(checkpoint)
        trainer.run()
    weights = engine.weights()
    engine.close()
    if rank() == 0:
        _finish(recipe, parts, run_dir, trainer, weights)


def _engine(recipe: Recipe, parts: "Parts", ds_config: dict[str, Any]) -> "Zero2Engine":
    """Around what is trained, a parameter group for each part."""
    from fastcraft.engine.groups import ParameterGroup
    from fastcraft.engine.zero2 import Zero2Engine

    trained, options = parts.model.trained, recipe.train
    groups = [
        ParameterGroup(
            name=part.name,
            parameters={f"{part.name}.{name}": parameter for name, parameter in part.parameters()},
            learning_rate=part.learning_rate,
            ema_decay=part.ema_decay,
        )
        for part in trained.trained_parts()
    ]
    return Zero2Engine(
        trained,
        ds_config=ds_config,
        device=parts.model.images.device,
        total_steps=options.num_steps,
        warmup_steps=options.warmup_steps,
        lr_schedule=options.lr_schedule,
        groups=groups,
        exact=parts.model.exact,
        watched=trained.parts[groups[-1].name].module,  # a UNet's first output has its gradient before the text has
    )


def _trainer(
    recipe: Recipe, parts: "Parts", engine: "Zero2Engine", *, run_dir: Path, interrupt: "Interrupt",
    record: "RunRecord | None",
) -> "Trainer":  # fmt: skip
    """The loop, over an image model whose encoder is called through the engine and whose steps may be interrupted."""
    from fastcraft.build.run import build_objective
    from fastcraft.engine.agreement import rank, world_size
    from fastcraft.evaluator import Evaluator
    from fastcraft.trainer import Trainer

    images = replace(parts.model.through(engine), on_step=interrupt.check)
    objective = build_objective(recipe, parts, images, rank=rank(), world_size=world_size())
    judges = parts.judges
    evaluator = Evaluator(
        recipe.evaluate,
        model=images,
        prompts=parts.prompts.evaluation,
        rewards=judges.rewards,
        held_out=judges.held_out,
        exam=judges.exam,
        seed=recipe.train.seed,
        decode_micro_batch=recipe.memory.decode_micro_batch,
        record=record,
    )
    trainer = Trainer(
        recipe.train,
        objective=objective,
        rewards=judges.rewards,
        engine=engine,
        evaluator=evaluator,
        device=images.device,
        run_dir=run_dir,
        interrupt=interrupt,
        smaller_plan=parts.plans.auto,
        depth=recipe.objective.settings.needs.backprop_steps,
        record=record,
    )
    evaluator.stop_together = trainer.stop_together
    return trainer


def _prepare(
    recipe: Recipe, args: argparse.Namespace, stack: contextlib.ExitStack
) -> tuple[Path, Path | None, list[str]]:
    """On rank 0: the run directory, held for this run; the checkpoint to go on from; what to tell the person."""
    from fastcraft.durable import write_json
    from fastcraft.engine.checkpoint import find_checkpoint, sweep_checkpoints
    from fastcraft.engine.run_directory import check_run_dir, choose_run_dir, lock, write_recipe
    from fastcraft.evaluation.environment import environment

    run_dir = choose_run_dir(args.run_dir, recipe_name=args.recipe, resume=args.resume)
    check_run_dir(run_dir, recipe, resume=args.resume)
    stack.enter_context(lock(run_dir))
    check_run_dir(run_dir, recipe, resume=args.resume)  # another process may have used it in between
    notes, newest = [f"results go to {run_dir}"], None
    if args.resume:
        sweep_checkpoints(run_dir / "checkpoints")
        newest, skipped = find_checkpoint(run_dir / "checkpoints")
        notes += [f"skipped {path.name}: {reason}" for path, reason in skipped]
        notes.append(f"going on from {newest.name}")
    write_recipe(run_dir, recipe)
    write_json(run_dir / "environment.json", environment())
    return run_dir, newest, notes


def _finish(recipe: Recipe, parts: "Parts", run_dir: Path, trainer: "Trainer", weights: Mapping[str, "Tensor"]) -> None:
    """Export, report and the last lines, on rank 0."""
    from fastcraft.build.export import export_run
    from fastcraft.evaluation.closing import closing_lines
    from fastcraft.evaluation.environment import environment
    from fastcraft.evaluation.record import read_evaluations
    from fastcraft.evaluation.report import write_report

    checks = [
        f"exported {e.path.relative_to(run_dir)}: reloaded, largest difference {e.max_abs_error:.1e}"
        for e in export_run(recipe, parts, weights, run_dir / "export", title=run_dir.name)
    ]
    evaluations = read_evaluations(run_dir)
    report = write_report(
        run_dir,
        title=run_dir.name,
        recipe_text=dump_recipe(recipe),
        prompts=parts.prompts.evaluation[: recipe.evaluate.num_samples],
        exam_before=evaluations[0]["evaluation"],
        exam_after=evaluations[-1]["evaluation"],
        environment=environment(),
        notes=[*trainer.notes(), *checks],
        command=shlex.join(["deepspeed", "fastcraft/train.py", *(a for a in sys.argv[1:] if "--local_rank" not in a)]),
    )
    base = parts.model.components.folder if recipe.model.path == "shapes" else recipe.model.path
    for line in checks:
        print(line)
    print(closing_lines(run_dir, base_model=str(base), report=report))


if __name__ == "__main__":
    sys.exit(main())
