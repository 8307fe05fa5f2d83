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


GRADIENT_RUNS = {"zero2": ("zero2", "float32", 1), "zero2_accumulated": ("zero2", "float32", 2),
                 "zero1_accumulated": ("zero1", "float32", 2), "zero2_bf16": ("zero2", "bfloat16", 1)}  # fmt: skip


def main(folder: Path, ds_configs: Path) -> None:
    torch.set_num_threads(1)
    zero2.init_distributed("cpu")
    rank = distributed.get_rank()
    batch = load_file(folder / "batch.safetensors")["input_ids"]  # (8, 77), the same on both ranks

    def engine(name: str, dtype: str, accumulation: int, kind: type = CLIPTextModel) -> zero2.Zero2Engine:
        model = kind(CLIPTextConfig.from_json_file(folder / "config.json"))
        if rank == 0:  # the other rank must be sent these weights
            model.load_state_dict(load_file(folder / "weights.safetensors"))
        recipe = json.loads((folder / "recipe.json").read_text())
        recipe |= {"batch_size": 4 // accumulation, "dtype": dtype, "gradient_accumulation_steps": accumulation}
        filled = fill_ds_config(load_ds_config(ds_configs / f"{name}.json"), **recipe)
        return zero2.Zero2Engine(
            model, ds_config=filled, device=torch.device("cpu"), total_steps=10, warmup_steps=2, lr_schedule="cosine"
        )

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

    checks = {"out_of_memory": outcomes, "stepped": tried.step().took_step}
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
