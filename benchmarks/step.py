"""Samples/s of the whole optimiser step against the published loop: ``python -m benchmarks.step [--out FILE]``.

Same models, prompts, noise and machine in one run, the loops taking turns, so that a noisy machine bothers all alike.
What counts is the ratio of medians. Memory is not compared here: all loops live in one process.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.published import PublishedLoop
from fastcraft.assemble import assemble, make_objective
from fastcraft.config import load_recipe
from fastcraft.data.order import PromptOrder
from fastcraft.engine.agreement import close_distributed
from fastcraft.engine.zero2 import Zero2Engine, fill_ds_config, init_distributed, load_ds_config
from fastcraft.evaluation.environment import environment
from fastcraft.recipe import Recipe

DS_CONFIG = Path(__file__).parents[1] / "ds_configs" / "zero2.json"


def published(
    recipe: Recipe, device: torch.device, *, repaired: bool, autocast: torch.dtype | None = None
) -> Callable[[int], float]:
    """A step function of the published loop, on modules of its own."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    parts = assemble(recipe, device=device)
    folder = parts.components.folder
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).to(device)
    scheduler = DDIMScheduler.from_config(
        DDIMScheduler.load_config(folder / "scheduler"), timestep_spacing="trailing", clip_sample=False
    )
    scheduler.set_timesteps(recipe.sampler.num_inference_steps)
    model = parts.components.text_encoder
    loop = PublishedLoop(
        unet=unet, vae=parts.components.vae, text_encoder=model, original=copy.deepcopy(model).requires_grad_(False),
        tokenizer=parts.components.tokenizer, scheduler=scheduler, rewards=parts.rewards,
        guidance_scale=recipe.sampler.guidance_scale, backprop_steps=recipe.objective.backprop_steps,
        latent_shape=parts.components.latent_shape, repaired=repaired, autocast=autocast,
    )  # fmt: skip
    order = PromptOrder(parts.prompts, seed=0)

    def step(number: int) -> float:
        batch = order.batch(number * recipe.train.batch_size, 0, batch_size=recipe.train.batch_size)
        return loop.step(batch.prompts, parts.image_model.noise(batch.indices)[0])

    return step


def fastcraft(recipe: Recipe, device: torch.device) -> Callable[[int], float]:
    """A step function of this project, through the ZeRO-2 engine."""
    parts = assemble(recipe, device=device)
    train = recipe.train
    parameters = [p.numel() for p in parts.trained.parameters() if p.requires_grad]
    config = fill_ds_config(
        load_ds_config(DS_CONFIG), batch_size=train.batch_size, gradient_accumulation_steps=1, dtype=train.dtype,
        max_grad_norm=train.max_grad_norm, learning_rate=train.learning_rate, betas=train.betas, eps=train.eps,
        weight_decay=train.weight_decay, num_parameters=sum(parameters), largest_parameter=max(parameters),
    )  # fmt: skip
    engine = Zero2Engine(
        parts.trained, ds_config=config, device=device, total_steps=train.num_steps, warmup_steps=0,
        lr_schedule="constant",
    )  # fmt: skip
    objective, _ = make_objective(recipe, parts, engine)
    order = PromptOrder(parts.prompts, seed=0)

    def step(number: int) -> float:
        batch = order.batch(number * train.batch_size, 0, batch_size=train.batch_size)
        (output,) = objective.losses(batch, draw=number)
        engine.backward(output.loss)
        engine.step()
        return float(output.loss.detach())

    return step


def measure(loops: dict[str, Callable[[int], float]], rounds: int, batch_size: int, device: torch.device) -> dict:
    """Seconds per step of every loop: one warm-up each, then ``rounds`` rounds in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds + 1):
        for name, step in loops.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            step(number)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:
                seconds[name].append(time.perf_counter() - began)
    base = statistics.median(next(iter(seconds.values())))
    rows = {}
    for name, values in seconds.items():
        low, middle, high = (statistics.quantiles(values, n=10)[i] for i in (1, 4, 7))
        rows[name] = {
            "seconds_20_50_80": [low, middle, high],
            "samples_per_sec": batch_size / middle,
            "ratio_to_first": base / statistics.median(values),
        }
    return rows


def table(rows: dict[str, Any]) -> str:
    """The rows as markdown."""
    lines = ["| loop | samples/s | s/step (20/50/80 %) | speed-up |", "|---|---|---|---|"]
    for name, row in rows.items():
        spread = " / ".join(f"{value:.2f}" for value in row["seconds_20_50_80"])
        lines.append(f"| {name} | {row['samples_per_sec']:.2f} | {spread} | {row['ratio_to_first']:.2f}x |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="shapes")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=7, help="measured steps of every loop, at least 2")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    recipe = load_recipe(args.recipe, args.overrides)
    exact = load_recipe(args.recipe, [*args.overrides, "train.dtype=float32"])
    keep = load_recipe(args.recipe, [*args.overrides, "memory.policy=none"])
    opened = init_distributed(device.type)
    half = recipe.train.dtype == "bfloat16"
    bf16 = {"frozen, bfloat16": published(exact, device, repaired=True, autocast=torch.bfloat16)} if half else {}
    loops = {
        "TextCraftor as published": published(exact, device, repaired=False),
        "the same, everything else frozen": published(exact, device, repaired=True),
        **bf16,
        "fastcraft, policy step": fastcraft(recipe, device),
        "fastcraft, policy none": fastcraft(keep, device),
    }
    rows = measure(loops, args.rounds, recipe.train.batch_size, device)
    print(table(rows))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "command": f"python -m benchmarks.step --recipe {args.recipe} --rounds {args.rounds}"
            + "".join(f" --set {item}" for item in args.overrides),
            "environment": environment(),
            "threads": torch.get_num_threads(),
            "rows": rows,
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if opened:
        close_distributed()


if __name__ == "__main__":
    main()
