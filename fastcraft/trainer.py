"""The training loop around the engine: steps, samples, checkpoints, export and report."""

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcraft.assemble import Parts, make_objective
from fastcraft.config import Recipe, dump_recipe
from fastcraft.data.order import PromptOrder, sample_seed
from fastcraft.engine.agreement import agree
from fastcraft.engine.checkpoint import CheckpointError, rng_tensors, save_checkpoint
from fastcraft.engine.interrupt import Interrupt, StopRequested
from fastcraft.engine.zero2 import Zero2Engine, gather_objects, rank, world_size
from fastcraft.evaluation.record import RunRecord
from fastcraft.evaluation.scores import evaluate_pictures
from fastcraft.records import LossOutput

_SAMPLE_STREAM = 7  # noise stream of the sampled pictures: the same at every evaluation


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message says why, and the last good checkpoint is on disk."""


class Trainer:
    """One run on one rank.

    Args:
        recipe: the resolved recipe.
        parts: what `assemble` built from it.
        engine: around ``parts.trained``.
        run_dir: exists, and belongs to this run.
        interrupt: polled between denoising steps.
        start: optimiser steps already done.
        record: on rank 0.
    """

    def __init__(
        self,
        recipe: Recipe,
        parts: Parts,
        *,
        engine: Zero2Engine,
        run_dir: Path,
        interrupt: Interrupt,
        start: int = 0,
        record: RunRecord | None = None,
    ) -> None:
        self.recipe = recipe
        self.parts = parts
        self.engine = engine
        self.run_dir = run_dir
        self.interrupt = interrupt
        self.done = start
        self.record = record
        self.objective, self.text = make_objective(recipe, parts, engine)
        self.order = PromptOrder(parts.prompts, seed=recipe.train.seed)
        self.bad_steps = 0
        self.saved = -1
        self.failed_saves = 0
        self.checked = False

    def run(self) -> None:
        """Train to the last step.

        Raises:
            StopRequested: a signal came; the last completed step has been saved.
            TrainingFailed: too many bad steps in a row, or a group of weights that does not learn.
        """
        recipe = self.recipe
        try:
            if self.done == 0:
                self.evaluate(recipe.evaluate.exam_num_samples)
            while self.done < recipe.train.num_steps:
                self.step()
                if recipe.train.checkpoint_every and self.done % recipe.train.checkpoint_every == 0:
                    self.save()
                if recipe.evaluate.every and self.done % recipe.evaluate.every == 0 and self.done < recipe.train.num_steps:
                    self.evaluate()
            self.save(last=True)
            self.evaluate(recipe.evaluate.exam_num_samples)
        except StopRequested:
            self.save(last=True)
            raise

    def step(self) -> None:
        """One optimiser step: accumulate micro-steps, then update, count and log."""
        train = self.recipe.train
        began = time.perf_counter()
        outputs: list[LossOutput] = []
        before = None if self.checked else self._snapshot()
        for micro in range(train.gradient_accumulation_steps):
            batch = self.order.batch(
                self.done,
                micro,
                rank(),
                world_size=world_size(),
                batch_size=train.batch_size,
                accumulation=train.gradient_accumulation_steps,
            )
            losses = self.objective.losses(batch, draw=self.done * train.gradient_accumulation_steps + micro)
            while (output := self._next(losses)) is not None:
                self.engine.backward(output.loss)
                norms = self.engine.group_gradient_norms() if before is not None else {}
                result = self.engine.step()
                outputs.append(LossOutput(loss=output.loss.detach(), metrics=output.metrics))
        self.done += 1
        if before is not None and not result.skipped:
            self._check_training(before, norms)
        self._count_bad(result.skipped)
        self._log(outputs, result, time.perf_counter() - began)

    def save(self, *, last: bool = False) -> None:
        """Checkpoint of the completed steps, by all ranks together; a failed periodic save is counted, not fatal."""
        if self.saved == self.done:
            return
        state = {"bad_steps": self.bad_steps, "rewards": self.parts.rewards.state_dict()}
        try:
            save_checkpoint(
                self.run_dir / "checkpoints",
                self.done,
                tensors=self.engine.state(),
                rank_tensors=rng_tensors(),
                state=state,
                keep=self.recipe.train.keep_checkpoints,
            )
            self.saved = self.done
        except CheckpointError as error:
            self.failed_saves += 1
            if last:
                raise TrainingFailed(f"the last checkpoint could not be written: {error}") from error
            self.say(f"checkpoint of step {self.done} failed, training goes on: {error}")

    @torch.no_grad()
    def evaluate(self, num_samples: int = 0) -> None:
        """Sample the fixed prompts, all ranks together; rank 0 scores the pictures and keeps the grid."""
        evaluate = self.recipe.evaluate
        prompts = self.parts.evaluation_prompts[: max(num_samples, evaluate.num_samples)]
        pictures = self.sample(prompts)
        if self.record is None or pictures is None:
            return
        scores = evaluate_pictures(
            pictures.to(self.parts.image_model.device),
            prompts,
            rewards=self.parts.rewards.score,
            exam=self.parts.exam,
            micro_batch=evaluate.batch_size,
        )
        self.record.log_evaluation(self.done, scores, pictures[: evaluate.num_samples], prompts[: evaluate.num_samples])

    def sample(self, prompts: Sequence[str]) -> Tensor | None:
        """Pictures ``(N, 3, H, W)`` on the CPU, shared out over the ranks; None except on rank 0."""
        mine = list(range(rank(), len(prompts), world_size()))
        size, chunks = self.recipe.evaluate.batch_size, []
        for first in range(0, len(mine), size):
            indices = mine[first : first + size]
            chunk = [prompts[index] for index in indices]
            trained_steps = self.recipe.evaluate.trained_steps
            chunks.append(
                self.parts.image_model.sample(
                    self.text.trained(chunk),
                    seeds=[sample_seed(self.recipe.train.seed, index, _SAMPLE_STREAM) for index in indices],
                    prefix=self.text.original(chunk) if trained_steps else None,
                    trained_steps=trained_steps,
                ).cpu()
            )
        gathered = gather_objects((mine, torch.cat(chunks) if chunks else None))
        if gathered is None:
            return None
        pictures: dict[int, Tensor] = {}
        for indices, rows in gathered:
            pictures.update(zip(indices, rows if rows is not None else [], strict=True))
        return torch.stack([pictures[index] for index in range(len(prompts))])

    def say(self, text: str) -> None:
        """A line for the person at the terminal, from rank 0."""
        if self.record is not None:
            self.record.say(text)

    def _next(self, losses: Iterator[LossOutput]) -> LossOutput | None:
        """The next loss, once all ranks agree that nobody was asked to stop; backward is collective, so none may leave."""
        output, stop = None, False
        try:
            output = next(losses, None)
        except StopRequested:
            stop = True
        if any(agree([stop or self.interrupt.requested])):
            raise StopRequested
        return output

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.engine.trainable_parameters().items()}

    def _check_training(self, before: dict[str, Tensor], norms: dict[str, float]) -> None:
        """After the first step: every trained group has a gradient and has moved (untrained encoders are a known bug)."""
        moved: dict[str, bool] = {}
        for name, parameter in self.engine.trainable_parameters().items():
            group = self.engine.group_of(name)
            moved[group] = moved.get(group, False) or not torch.equal(parameter.detach(), before[name])
        idle = sorted(group for group in moved if not moved[group] or not norms.get(group, 0) > 0)
        if idle:
            raise TrainingFailed(f"after the first step these groups have no gradient or have not moved: {idle}")
        self.checked = True

    def _count_bad(self, skipped: bool) -> None:
        """Skipped steps in a row; past the limit the run ends with the weights of the last good step."""
        self.bad_steps = self.bad_steps + 1 if skipped else 0
        if skipped:
            self.say(f"step {self.done}: loss or gradient is not finite, step skipped ({self.bad_steps} in a row)")
        if self.bad_steps >= self.recipe.train.max_bad_steps:
            self.save(last=True)
            raise TrainingFailed(f"{self.bad_steps} steps in a row had a loss or gradient that is not finite")

    def _log(self, outputs: list[LossOutput], result: Any, seconds: float) -> None:
        """One line of metrics.jsonl; the only place where numbers leave the device."""
        names = outputs[0].metrics.keys()
        means = {name: torch.stack([output.metrics[name].float() for output in outputs]).mean().item() for name in names}
        if self.record is None:
            return
        samples = self.recipe.train.batch_size * self.recipe.train.gradient_accumulation_steps
        self.record.log_step(
            {
                "step": self.done,
                "loss": torch.stack([output.loss.float() for output in outputs]).mean().item(),
                "rewards": {name.removeprefix("reward/"): value for name, value in means.items() if "reward/" in name},
                **{name: value for name, value in means.items() if "reward/" not in name},
                "grad_norm": result.grad_norm,
                "lr": result.lr,
                "samples_per_sec_per_gpu": samples / seconds,
                "step_time_s": seconds,
                "peak_memory_mib": peak_memory_mib(self.parts.image_model.device),
                "skipped": result.skipped,
            }
        )


def peak_memory_mib(device: torch.device) -> float:
    """Largest allocation so far: of the CUDA allocator, or the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def describe(recipe: Recipe, parts: Parts, num_parameters: tuple[int, int]) -> str:
    """What `--dry-run` prints."""
    from fastcraft.memory.cost import count_flops, step_flops
    from fastcraft.records import KEEP

    model, train = parts.image_model, recipe.train
    guided = model.guidance_scale != 1
    plan = parts.make_plan(recipe.objective.backprop_steps)
    embeds = parts.original(torch.zeros(1, 1, 77, dtype=torch.long, device=model.device))
    from fastcraft.diffusion.text_kv import project_text

    text_kv = project_text(model.unet, embeds)
    from fastcraft.diffusion.unroll import predict_noise

    timestep = torch.tensor(0, device=model.device)
    shape = (1, *model.latent_shape)
    unet = count_flops(lambda x: predict_noise(model.unet, x, timestep, text_kv, guidance_scale=1), shape)
    decode = count_flops(lambda x: model.decode(x, plan), shape)
    samples = train.batch_size * train.gradient_accumulation_steps
    flops = step_flops(
        unet,
        decode,
        samples=samples,
        num_inference_steps=recipe.sampler.num_inference_steps,
        backprop_steps=recipe.objective.backprop_steps,
        guided=guided,
        recompute=plan.decode != KEEP,
    )
    trainable, frozen = num_parameters
    lines = [
        dump_recipe(recipe).rstrip(),
        "",
        f"plan        {recipe.memory.policy}: steps with gradient {', '.join(plan.steps)}; decode {plan.decode}",
        f"parameters  {trainable:,} trainable, {frozen:,} frozen",
        f"prompts     {len(parts.prompts):,}" + "".join(f"; {note}" for note in parts.prompt_notes),
        f"per step    {samples} samples on each of {world_size()} ranks, {sum(flops.values()) / 1e9:,.1f} GFLOP a rank: "
        + ", ".join(f"{name} {value / 1e9:,.1f}" for name, value in flops.items()),
    ]
    return "\n".join(lines)
