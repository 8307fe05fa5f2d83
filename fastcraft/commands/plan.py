"""``fastcraft plan``: memory and time of a training step on a card that need not be there."""

import argparse
import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcraft.errors import UserError, named

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastcraft.diffusion.patch import Patch
    from fastcraft.forecast.networks import Networks
    from fastcraft.forecast.planner import Choice, Planner
    from fastcraft.memory.plan import CheckpointPlan

HELP = "predict memory and time of a training step on a card, and the plan and batch that suit it best"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    add = parser.add_argument
    add(
        "--model", required=True, metavar="DIR|NAME", help="a diffusers folder, or sd15, sd21, sdxl, shapes; no weights"
    )
    add("--device", required=True, metavar="CARD|SIZE", help="a100-40g, a100-80g, h100, h200, 4090, or bytes: 24GiB")
    add("--depth", type=int, default=5, metavar="K", help="denoising steps with gradient (default: 5)")
    add("--steps", type=int, default=25, metavar="T", help="all denoising steps (default: 25)")
    add(
        "--batch", type=int, default=0, metavar="B", help="samples per device and micro-step; 0 = the best (default: 0)"
    )
    add("--resolution", type=int, default=0, metavar="PIXELS", help="width and height; 0 = the model's own")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the frozen networks")
    add("--guidance", type=float, default=7.5, metavar="SCALE", help="1 = one UNet row per sample (default: 7.5)")
    add(
        "--rewards", default="clip,aesthetic,pickscore,hpsv2", metavar="NAMES",
        help="published rewards, or folders of a CLIP model, joined by commas (default: %(default)s)",
    )  # fmt: skip
    add("--world-size", type=int, default=1, metavar="N", help="ranks of ZeRO-2 (default: 1)")
    add(
        "--no-input-grad",
        action="store_true",
        help="a stop-gradient on the UNet's latents: objective.input_grad = false",
    )
    add(
        "--kernels", choices=("auto", "reference"), default="auto",
        help="auto: UNet, VAE and rewards with the fused ops, as a run on CUDA has them; reference: without",
    )  # fmt: skip
    add("--policy", default="auto", metavar="POLICY", help="predict this memory.policy instead of planning")
    add("--json", type=Path, metavar="FILE", help="write everything there too")


def run(args: argparse.Namespace) -> int:
    """Print the plan; exit status 0."""
    _check(args)
    from fastcraft.forecast.cache import cached_estimate
    from fastcraft.forecast.cards import find_card
    from fastcraft.forecast.phases import OFFLOADS, TREATMENTS
    from fastcraft.forecast.planner import BATCH_SIZES, Planner
    from fastcraft.memory.policies import plan_maker

    card = find_card(args.device)
    make_plan = None
    if args.policy != "auto":
        with named("--policy: "):
            make_plan = plan_maker(
                args.policy, backprop_steps=args.depth, decode_micro_batch=0, device_type="cuda",
                input_grad=not args.no_input_grad,
            )  # fmt: skip
    needed = set(make_plan(args.depth).steps) if make_plan else set()
    to_price = networks(args)
    with contextlib.nullcontext() if args.kernels == "reference" else _fused(to_price):
        estimate = cached_estimate(
            to_price, guided=args.guidance != 1, world_size=args.world_size,
            treatments=tuple(sorted({*TREATMENTS, *OFFLOADS, *needed})),
        )  # fmt: skip
    planner = Planner(estimate, card, num_inference_steps=args.steps, input_grad=not args.no_input_grad)
    sizes = [args.batch] if args.batch else list(BATCH_SIZES)
    rows = _rows(planner, make_plan, args, sizes)
    best = max((row for row in rows if row.peak_bytes <= planner.budget_bytes), key=lambda row: row.samples_per_sec)
    print(_report(planner, best, rows, args))
    if args.json:
        text = json.dumps(_as_json(planner, best, rows, args), indent=1) + "\n"
        try:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json: cannot write {args.json}: {error.strerror}") from error
    return 0


def _fused(to_price: "Networks") -> "Patch":
    from fastcraft.diffusion.patch import Patch

    return Patch(to_price.unet, to_price.vae, *to_price.rewards.image_networks)  # type: ignore[misc]


def networks(args: argparse.Namespace) -> "Networks":
    """The networks of ``--model`` and ``--rewards``, from configurations alone."""
    import torch

    from fastcraft.forecast.architectures import MODELS, towers_of
    from fastcraft.forecast.networks import networks_from_configs
    from fastcraft.shapes import PIPELINE

    towers: list[Any] = []
    names = [name.strip() for name in args.rewards.split(",") if name.strip()]
    towers += towers_of(name for name in names if not Path(name).is_dir())
    towers += [_read(Path(name) / "config.json", "--rewards")["vision_config"] for name in names if Path(name).is_dir()]
    path = PIPELINE if args.model == "shapes" else Path(args.model)
    if args.model in MODELS:
        configs = MODELS[args.model]
    elif (path / "unet").is_dir():
        texts = [path / "text_encoder", path / "text_encoder_2"]
        configs = {
            "unet": _read(path / "unet" / "config.json", "--model"),
            "vae": _read(path / "vae" / "config.json", "--model"),
            "text_encoders": [_read(text / "config.json", "--model") for text in texts if text.is_dir()],
        }
    else:
        raise UserError(
            f"--model: expected a diffusers folder or one of {', '.join(MODELS)}, shapes; got {args.model!r}"
        )
    with named("--model: "):
        return networks_from_configs(
            args.model, configs, towers=towers, dtype=getattr(torch, args.dtype), resolution=args.resolution
        )


def _check(args: argparse.Namespace) -> None:
    for name, least in (
        ("depth", 1),
        ("steps", 1),
        ("batch", 0),
        ("resolution", 0),
        ("guidance", 1),
        ("world_size", 1),
    ):
        if not getattr(args, name) >= least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    if args.depth > args.steps:
        raise UserError(f"--depth must be at most --steps ({args.steps}), got {args.depth}")


def _read(file: Path, argument: str) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{argument}: cannot read {file}: {error}") from error


def _rows(
    planner: "Planner", make_plan: "Callable[[int], CheckpointPlan] | None", args: argparse.Namespace, sizes: list[int]
) -> list["Choice"]:
    """The best choice at every batch that fits; under a named policy that policy's, fitting or not.

    Raises:
        UserError: nothing fits.
    """
    from fastcraft.forecast.planner import Choice, DoesNotFitError

    rows: list[Choice] = []
    if make_plan is None:
        for size in sizes:
            try:
                rows.append(planner.choose(args.depth, batch_sizes=[size]))
            except DoesNotFitError:
                if not rows:
                    raise
                break
        return rows
    for size in sizes:
        row = planner.weigh(make_plan(args.depth), batch_size=size)
        rows.append(row)
        if row.peak_bytes > planner.budget_bytes:
            break
    if rows[0].peak_bytes > planner.budget_bytes:
        raise UserError(
            f"--policy: {args.policy!r} takes {rows[0].peak_bytes / 2**30:.2f} GiB at batch {sizes[0]}, the budget of "
            f"{planner.card.name} is {planner.budget_bytes / 2**30:.2f} GiB; 'auto' finds what fits"
        )
    return rows


def _report(planner: "Planner", best: "Choice", rows: list["Choice"], args: argparse.Namespace) -> str:
    from fastcraft.forecast.cards import CALIBRATED, ERROR_BANDS

    estimate, card, full = planner.estimate, planner.card, planner.predict(best)
    known = "calibrated" if CALIBRATED else "not calibrated on a card yet"
    lines = [
        f"model      {estimate.model}, {estimate.resolution} px, {estimate.dtype}, "
        f"{'guided' if estimate.guided else 'not guided'}, T = {args.steps}, K = {args.depth}; rewards {args.rewards}",
        f"kernels    {'fused ops, as on CUDA' if args.kernels == 'auto' else 'none'}",
        f"device     {card.name}: {_gib(card.memory_bytes)}, {_gib(planner.budget_bytes)} of it for tensors",
        f"attention  {', '.join(name for name in estimate.attention if not name.endswith('backward'))}",
        f"errors     allow for {ERROR_BANDS['peak_bytes']:.0%} of bytes, {ERROR_BANDS['seconds']:.0%} of time: {known}",
        "",
        f"plan       batch {best.batch_size}: {best.describe()}",
        f"peak       {_gib(full.peak_bytes)}, at: {full.at}",
        *(f"  {kind:<24}{_gib(size):>12}" for kind, size in full.bytes_by_kind.items() if size),
        *([f"  {'in host memory':<24}{_gib(full.host_bytes):>12}"] if full.host_bytes else []),
        f"time       {full.seconds:.3f} s per micro-step, {full.samples_per_sec:.2f} samples/s, "
        f"{full.flops / 1e12:.1f} TFLOP",
        *(f"  {phase:<24}{seconds:>10.3f} s" for phase, seconds in full.seconds_by_phase.items()),
        "",
        f"{'batch':>6}{'peak':>13}{'s/step':>9}{'samples/s':>11}  plan",
    ]
    for row in rows:
        mark = " *" if row is best else "  " if row.peak_bytes <= planner.budget_bytes else " !"
        lines.append(
            f"{row.batch_size:>6}{_gib(row.peak_bytes):>13}{row.seconds:>9.3f}{row.samples_per_sec:>11.2f}{mark}"
            f"{row.describe()}"
        )
    if estimate.uncounted:
        lines.append(f"without the FLOPs of {', '.join(estimate.uncounted)}: times are too low")
    return "\n".join(lines)


def _as_json(planner: "Planner", best: "Choice", rows: list["Choice"], args: argparse.Namespace) -> dict[str, Any]:
    from dataclasses import asdict

    from fastcraft.forecast.cards import CALIBRATED, ERROR_BANDS

    options = {name: value for name, value in vars(args).items() if name not in ("run", "json")}
    return {
        "options": options,
        "card": asdict(planner.card),
        "budget_bytes": planner.budget_bytes,
        "calibrated": CALIBRATED,
        "error_bands": ERROR_BANDS,
        "attention": planner.estimate.attention,
        "uncounted_ops": planner.estimate.uncounted,
        "best": asdict(best) | {"prediction": asdict(planner.predict(best))},
        "batches": [asdict(row) | {"samples_per_sec": row.samples_per_sec} for row in rows],
    }


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"
