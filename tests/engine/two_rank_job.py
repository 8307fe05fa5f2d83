"""Run by test_two_ranks.py in two processes: everything that needs a second rank, in one go."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as distributed
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from fastcraft.engine import zero2
from fastcraft.engine.agreement import agree, barrier, close_distributed
from fastcraft.engine.checkpoint import (
    CheckpointError,
    find_checkpoint,
    load_checkpoint,
    restore_rng,
    rng_tensors,
    save_checkpoint,
)
from fastcraft.engine.ds_config import fill_ds_config, load_ds_config
from fastcraft.engine.out_of_memory import MemoryRanOutError


class Embeds(CLIPTextModel):
    """A text encoder whose output is a tensor, as that of a run."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids).last_hidden_state


class Full:
    """A hook on a gradient: the first time memory runs out, if ``fails``."""

    def __init__(self, *, fails: bool) -> None:
        self.fails = fails

    def __call__(self, gradient: torch.Tensor) -> None:
        if self.fails:
            self.fails = False
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def two_groups(model: torch.nn.Module, *, ema_decay: float) -> list[zero2.ParameterGroup]:
    """The embeddings at twice the rate, with an average beside them; and the rest."""
    named = dict(model.named_parameters())
    first = {name: param for name, param in named.items() if name.startswith("embeddings")}
    rest = {name: param for name, param in named.items() if name not in first}
    return [
        zero2.ParameterGroup(name="embeddings", parameters=first, learning_rate=2e-3, ema_decay=ema_decay),
        zero2.ParameterGroup(name="rest", parameters=rest, learning_rate=1e-3),
    ]


def far_from_naive(states: list[dict[str, torch.Tensor]], bound: float) -> float:
    """Largest difference of the averages at the end from those of the whole weights of every state."""
    averages = {name: states[0][f"param.{name}"].clone() for name in names_averaged(states[0])}
    for number, state in enumerate(states[1:], start=1):
        decay = min(bound, (1 + number) / (10 + number))
        averages = {name: decay * value + (1 - decay) * state[f"param.{name}"] for name, value in averages.items()}
    return max(float((states[-1][f"ema.{name}"] - value).abs().max()) for name, value in averages.items())


def names_averaged(state: dict[str, torch.Tensor]) -> list[str]:
    return [name.removeprefix("ema.") for name in state if name.startswith("ema.")]


def swaps(engine: zero2.Zero2Engine, state: dict[str, torch.Tensor]) -> list[bool]:
    """Whether the averages were in the weights' places, whole on this rank, and the weights are back to the bit."""
    params = engine.trainable_parameters()
    before = {name: param.detach().clone() for name, param in params.items()}
    with engine.averaged():
        inside = [
            torch.equal(params[name], state[f"ema.{name}"].to(params[name].dtype)) for name in names_averaged(state)
        ]
        moved = [not torch.equal(params[name], before[name]) for name in names_averaged(state)]
    return [all(inside), all(moved), all(torch.equal(param, before[name]) for name, param in params.items())]


GRADIENT_RUNS = {"zero2": ("zero2", "float32", 1), "zero2_accumulated": ("zero2", "float32", 2),
                 "zero1_accumulated": ("zero1", "float32", 2), "zero2_bf16": ("zero2", "bfloat16", 1)}  # fmt: skip


def main(folder: Path, ds_configs: Path) -> None:
    torch.set_num_threads(1)
    zero2.init_distributed("cpu")
    rank = distributed.get_rank()
    batch = load_file(folder / "batch.safetensors")["input_ids"]  # (8, 77), the same on both ranks

    def engine(
        name: str, dtype: str, accumulation: int, kind: type = CLIPTextModel, *, bf16_weights: bool = False,
        ema_decay: float = 0.0,
    ) -> zero2.Zero2Engine:  # fmt: skip
        model = kind(CLIPTextConfig.from_json_file(folder / "config.json"))
        if rank == 0:  # the other rank must be sent these weights
            model.load_state_dict(load_file(folder / "weights.safetensors"))
        if bf16_weights:
            model.bfloat16()
        recipe = json.loads((folder / "recipe.json").read_text())
        recipe |= {"batch_size": 4 // accumulation, "dtype": dtype, "gradient_accumulation_steps": accumulation}
        filled = fill_ds_config(load_ds_config(ds_configs / f"{name}.json"), **recipe)
        return zero2.Zero2Engine(
            model, ds_config=filled, device=torch.device("cpu"), total_steps=10, warmup_steps=2, lr_schedule="cosine",
            groups=two_groups(model, ema_decay=ema_decay),
            exact=load_file(folder / "weights.safetensors") if bf16_weights else None,
        )  # fmt: skip

    def update(engine: zero2.Zero2Engine, accumulation: int) -> tuple[dict[str, torch.Tensor], list[float]]:
        losses = []
        for micro_batch in batch[4 * rank : 4 * rank + 4].chunk(accumulation):
            noise = torch.rand(())  # the loss depends on this rank's random state
            loss = (engine(micro_batch).last_hidden_state[..., :8].float().pow(2).mean()) * (1 + 0 * noise)
            losses.append(float(loss.detach()) + float(noise))
            engine.backward(loss / accumulation, closes_update=len(losses) == accumulation)
            if len(losses) == accumulation:
                gradients = engine.gradients()
            engine.step()
        return gradients, losses

    for run, (name, dtype, accumulation) in GRADIENT_RUNS.items():
        trained = engine(name, dtype, accumulation)
        gradients, _ = update(trained, accumulation)
        if rank == 0:
            save_file({name: gradient.clone() for name, gradient in gradients.items()}, folder / f"{run}.safetensors")

    checks: dict[str, object] = {}
    for run, bf16_weights in (("parts", False), ("parts_bf16", True)):
        dtype = "bfloat16" if bf16_weights else "float32"
        trained = engine("zero2", dtype, 1, bf16_weights=bf16_weights, ema_decay=0.2)
        states = [trained.state()]
        gradients, _ = update(trained, 1)
        for _ in range(2):
            states.append(trained.state())
            update(trained, 1)
        states.append(trained.state())
        if rank == 0:
            save_file({name: gradient.clone() for name, gradient in gradients.items()}, folder / f"{run}.safetensors")
            save_file(states[0], folder / f"{run}-begun.safetensors")
            save_file(states[-1], folder / f"{run}-trained.safetensors")
        checks |= {f"{run}_average": far_from_naive(states, 0.2), f"{run}_swapped": swaps(trained, states[-1])}

    # rank 1 has no memory left in the frozen chain, while rank 0 comes to the encoder's gradients
    tried, full, outcomes = engine("zero2", "float32", 1, Embeds), Full(fails=rank == 1), []
    while len(outcomes) < 3 and outcomes[-1:] != ["done"]:
        tried.begin()
        pictures = tried(batch[4 * rank : 4 * rank + 4]) * 1
        pictures.register_hook(full)
        try:
            tried.backward(pictures[..., :8].float().pow(2).mean())
            outcomes.append("done")
        except MemoryRanOutError as error:
            outcomes.append(str(error))
    gradients = tried.gradients()
    if rank == 0:
        save_file({name: gradient.clone() for name, gradient in gradients.items()}, folder / "zero2_again.safetensors")

    checks |= {"out_of_memory": outcomes, "stepped": tried.step().took_step}
    checks |= {"agree": agree([rank == 0, rank == 1, False])}

    poisoned = engine("zero2", "float32", 1)
    poisoned.backward(poisoned(batch[:4]).last_hidden_state.mean() * (float("nan") if rank == 1 else 1.0))
    checks["nan_on_rank_1"] = poisoned.step().skipped

    torch.manual_seed(100 + rank)
    first = engine("zero2", "float32", 1)
    for _ in range(2):
        update(first, 1)
    checkpoints = folder / "checkpoints"
    save_checkpoint(
        checkpoints, 2, tensors=first.state(), rank_tensors=rng_tensors(), state={"next_prompt": 16}, keep=2
    )
    wanted = [update(first, 1)[1] for _ in range(3)]
    checkpoint = load_checkpoint(find_checkpoint(checkpoints)[0], rank=rank, world_size=2)
    second = engine("zero2", "float32", 1)
    torch.manual_seed(0)
    second.load_state(checkpoint.tensors)
    restore_rng(checkpoint.rank_tensors)
    checks["continues"] = [update(second, 1)[1] for _ in range(3)] == wanted
    checks["same_state"] = all(
        torch.equal(tensor, other)
        for tensor, other in zip(first.state().values(), second.state().values(), strict=True)
    )
    try:  # rank 1 cannot write: rank 0 must hear of it
        writable = checkpoints if rank == 0 else checkpoints / "step-000002" / "state.json"
        save_checkpoint(writable, 3, tensors={}, rank_tensors=rng_tensors(), state={}, keep=2)
    except CheckpointError as error:
        checks["failed_together"] = str(error)
    barrier()
    checks["left"] = sorted(path.name for path in checkpoints.iterdir())
    (folder / f"checks-{rank}.json").write_text(json.dumps(checks))
    barrier()
    close_distributed()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
