"""``fastcraft profile``: memory and time per denoising depth on this machine, beside what was predicted."""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcraft.errors import UserError

if TYPE_CHECKING:
    import torch

    from fastcraft.forecast.profile import Row
    from fastcraft.recipe import Recipe

HELP = "measure memory and time per denoising depth on this machine, beside the prediction"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    add = parser.add_argument
    add("--depths", default="1,5,10", metavar="K,K,...", help="steps with gradient (default: %(default)s)")
    add(
        "--policies", default="none,step,sac:attention+conv,auto", metavar="P,P,...",
        help="memory policies (default: %(default)s)",
    )  # fmt: skip
    add("--recipe", default="shapes", metavar="NAME|FILE.toml", help="what to run (default: shapes)")
    add(
        "--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE",
        help="change one value of the recipe; repeatable",
    )  # fmt: skip
    add("--repeats", type=int, default=3, metavar="N", help="timed rounds over all settings (default: 3)")
    add("--out", type=Path, metavar="DIR", help="write NAME.csv, .json and .png there")
    add("--name", default="memory_by_depth", help="of these files (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Measure every setting, print the table, write the files; exit status 0."""
    depths = _numbers(args.depths)
    if args.repeats < 1:
        raise UserError(f"--repeats must be at least 1, got {args.repeats}")
    import torch

    from fastcraft.config import load_recipe
    from fastcraft.forecast.profile import table

    policies = [name.strip() for name in args.policies.split(",") if name.strip()]
    if not policies:
        raise UserError(f"--policies: at least one name is required, got {args.policies!r}")
    shallow = load_recipe(args.recipe, args.overrides, {"objective.backprop_steps": 1})
    longest = shallow.sampler.num_inference_steps
    if max(depths) > longest:
        raise UserError(f"--depths must be at most sampler.num_inference_steps ({longest}), got {max(depths)}")
    for switch in ("compile", "cuda_graphs"):
        if (value := getattr(shallow.kernels, switch)) != "none":
            raise UserError(f"profile counts bytes op by op: kernels.{switch} must be 'none', got {value!r}")
    recipes = {
        (depth, name): load_recipe(
            args.recipe, args.overrides, {"objective.backprop_steps": depth, "memory.policy": name}
        )
        for depth in depths
        for name in policies
    }
    if args.out:
        _make_folder((args.out / args.name).parent)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    rows = measure(recipes, device=device, repeats=args.repeats)
    print(table(rows))
    if args.out:
        write(rows, args.out / args.name, recipe=next(iter(recipes.values())), device=device, command=_command(args))
    return 0


def measure(recipes: "dict[tuple[int, str], Recipe]", *, device: "torch.device", repeats: int) -> "list[Row]":
    """A row for every (depth, policy) that fits, all on the same networks, prompts and noise.

    Args:
        recipes: alike but for depth and policy.
        device: where to run.
        repeats: timed rounds over all of them.
    """
    import torch

    from fastcraft.build.plan import build_plans, run_planner
    from fastcraft.build.run import build_objective, build_run
    from fastcraft.dry_run import networks_in
    from fastcraft.engine.out_of_memory import is_out_of_memory
    from fastcraft.forecast.auto import treatments_on
    from fastcraft.forecast.planner import describe
    from fastcraft.forecast.profile import measure_row, time_steps

    first = next(iter(recipes.values()))
    parts = build_run(first, device=device)
    modules = (*networks_in(parts), parts.judges.rewards)
    weights = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    size = first.train.batch_size
    rows, steps = [], []
    for (depth, name), recipe in recipes.items():
        plans = build_plans(recipe, parts.networks, device)
        plan = plans.make(depth)
        planner = run_planner(recipe, parts.networks, device, treatments={*treatments_on(device), *plan.steps})
        predicted = planner.predict(planner.weigh(plan, batch_size=size))
        objective = build_objective(recipe, replace(parts, plans=plans), parts.model.images)

        def step(objective: Any = objective) -> torch.Tensor:
            return next(objective.round(0)).loss

        try:
            row = measure_row(
                step,
                depth=depth,
                policy=name,
                plan=describe(plan, batch_size=size),
                predicted=predicted,
                static_bytes=planner.estimate.static_bytes,
                weights=weights,
                device=device,
            )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            print(f"depth {depth}, {name}: does not fit in memory here")
            continue
        rows.append(row)
        steps.append(step)
    timed = time_steps(steps, weights=weights, device=device, repeats=repeats)
    return [replace(row, seconds=seconds) for row, seconds in zip(rows, timed, strict=True)]


def write(rows: "list[Row]", stem: Path, *, recipe: "Recipe", device: "torch.device", command: str) -> None:
    """``stem`` with .csv, .json (with machine, versions and command) and .png; its folder is there."""
    from fastcraft.evaluation.environment import environment
    from fastcraft.forecast.plot import plot
    from fastcraft.forecast.profile import as_csv

    stem.with_name(f"{stem.name}.csv").write_text(as_csv(rows), encoding="utf-8")
    result = {"command": command, "environment": environment(), "rows": [asdict(row) for row in rows]}
    stem.with_name(f"{stem.name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    title = f"{Path(recipe.model.path).name}, batch {recipe.train.batch_size}, {recipe.train.dtype}, {device.type}"
    plot(rows, stem.with_name(f"{stem.name}.png"), title=title)


def _make_folder(folder: Path) -> None:
    """Before anything is measured."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot make the folder {folder}: {error.strerror}") from error


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise UserError(f"--depths must be numbers of steps, 1 or more, joined by commas, got {text!r}")
    return sorted({int(part) for part in parts})


def _command(args: argparse.Namespace) -> str:
    sets = "".join(f" --set {item}" for item in args.overrides)
    return (
        f"fastcraft profile --recipe {args.recipe} --depths {args.depths} --policies {args.policies} "
        f"--repeats {args.repeats}{sets}"
    )
