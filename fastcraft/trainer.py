"""The training loop around the engine: steps, samples, checkpoints, export and report."""

import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastcraft.assemble import Parts, make_objective, make_order
from fastcraft.engine.agreement import agree, from_rank_zero, mean_over_ranks, rank, world_size
from fastcraft.engine.checkpoint import Checkpoint, CheckpointError, restore_rng, rng_tensors, save_checkpoint
from fastcraft.engine.interrupt import Interrupt, StopRequested
from fastcraft.engine.out_of_memory import MemoryRanOutError, is_out_of_memory
from fastcraft.engine.zero2 import StepResult, Zero2Engine
from fastcraft.evaluation.record import RunRecord, read_evaluations
from fastcraft.evaluator import Evaluator
from fastcraft.recipe import Recipe
from fastcraft.records import LossOutput

_COUNTERS = ("samples_seen", "bad_steps", "skipped_steps", "failed_saves")  # kept in the checkpoint


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
        record: RunRecord | None = None,
    ) -> None:
        self.recipe = recipe
        self.parts = replace(parts, image_model=replace(parts.image_model, on_step=interrupt.check))
        self.engine = engine
        self.run_dir = run_dir
        self.interrupt = interrupt
        self.done = 0
        self.record = record
        self.objective, text = make_objective(recipe, self.parts, engine)
        self.evaluator = Evaluator(recipe, self.parts, text=text, stop_together=self._stop_together, record=record)
        self.order = make_order(recipe, parts, world_size=world_size())
        self.samples_seen = self.bad_steps = self.skipped_steps = 0
        self.saved = -1
        self.failed_saves = 0
        self.checked = False
        self.exam_size = max(recipe.evaluate.exam_num_samples, recipe.evaluate.num_samples)

    def run(self) -> None:
        """Train to the last step.

        Raises:
            StopRequested: a signal came; the last completed step has been saved.
            TrainingFailed: too many bad steps in a row, or a group of weights that does not learn.
        """
        recipe = self.recipe
        try:
            if self.done == 0:
                self.evaluator.evaluate(0, self.exam_size)
            elif self._evaluation_due() and not self._was_evaluated():
                self.evaluator.evaluate(self.done)
            else:
                self.evaluator.watch(self.done)  # a run that was ended stays ended
            while self.done < recipe.train.num_steps and not self.evaluator.ended:
                self.step()
                if recipe.train.checkpoint_every and self.done % recipe.train.checkpoint_every == 0:
                    self.save()
                if self._evaluation_due():
                    self.evaluator.evaluate(self.done)
            self.save(last=True)
            self.evaluator.evaluate(self.done, self.exam_size)
        except StopRequested:
            self.save(last=True)
            raise

    def step(self) -> None:
        """One optimiser step: accumulate micro-steps, then update, count and log."""
        train = self.recipe.train
        began = time.perf_counter()
        if self.parts.image_model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.parts.image_model.device)
        outputs: list[LossOutput] = []
        before = None if self.checked else self._clones()
        norms: dict[str, float] = {}
        for micro in range(train.gradient_accumulation_steps):
            first = self.samples_seen + micro * world_size() * train.batch_size
            watched = before is not None and micro == train.gradient_accumulation_steps - 1
            while (done := self._micro_step(first, watched=watched)) is None:
                pass
            more, result, found = done
            outputs, norms = outputs + more, norms | found
        self.done += 1
        self._say_what_ran_slower()
        self.samples_seen += train.gradient_accumulation_steps * world_size() * train.batch_size
        if before is not None and not result.skipped:
            self._check_training(before, norms)
        self._log(outputs, result, began)
        self._count_bad(result.skipped)

    def _micro_step(self, first: int, *, watched: bool) -> tuple[list[LossOutput], StepResult, dict[str, float]] | None:
        """Losses, the engine's last answer and, if ``watched``, gradient norms; None: out of memory, plan with less."""
        batch = self.order.batch(first, rank(), batch_size=self.recipe.train.batch_size)
        statistics = {name: values.clone() for name, values in self.parts.rewards.state_dict().items()}
        losses = self.objective.losses(batch, draw=first)
        outputs: list[LossOutput] = []
        norms: dict[str, float] = {}
        output = None
        try:
            while (output := self._next(losses)) is not None:
                self._backward(output.loss)
                if watched:
                    norms = self.engine.group_gradient_norms()
                self.parts.rewards.synchronize()
                result = self.engine.step()
                outputs.append(LossOutput(loss=output.loss.detach(), metrics=output.metrics))
            return outputs, result, norms
        except MemoryRanOutError:
            if outputs:
                raise TrainingFailed("out of memory between two updates of one micro-step") from None
        del losses, output  # they hold what did not fit
        self._fall_back(statistics)
        return None

    def _backward(self, loss: Tensor) -> None:
        """The engine's backward.

        Raises:
            MemoryRanOutError: on every rank, with nothing half done.
            TrainingFailed: memory ran out inside the trained encoder, whose gradients are half added up by then.
        """
        try:
            self.engine.backward(loss)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingFailed(
                "out of memory in the text encoder's backward, where gradients are being added up and a step cannot be "
                f"begun again; set text.gradient_checkpointing or give memory.budget_gib less: "
                f"{str(error).splitlines()[0]}"
            ) from error

    def _fall_back(self, statistics: dict[str, Tensor]) -> None:
        """Plan with less memory from now on, and undo what the failed micro-step told the rewards; said once.

        Raises:
            TrainingFailed: the policy is not ``auto``, or nothing smaller is left.
        """
        if self.parts.auto is None:
            raise TrainingFailed("out of memory; memory.policy = 'auto' plans with less by itself")
        note = self.parts.auto.fall_back(self.recipe.objective.backprop_steps)
        if any(agree([note is None])):
            raise TrainingFailed("out of memory under the smallest plan; take a smaller train.batch_size")
        self.parts.rewards.load_state_dict(statistics)
        if self.parts.image_model.device.type == "cuda":
            torch.cuda.empty_cache()
        self.say(f"step {self.done + 1}: {note}")

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint.

        At another world size the default random generators start anew; prompts and noise do not depend on them.
        """
        rewards = {
            name.removeprefix("reward."): t for name, t in checkpoint.tensors.items() if name.startswith("reward.")
        }
        self.parts.rewards.load_state_dict(rewards)
        self.engine.load_state({name: t for name, t in checkpoint.tensors.items() if not name.startswith("reward.")})
        if checkpoint.rank_tensors is not None:
            restore_rng(checkpoint.rank_tensors)
        self.done = self.saved = checkpoint.step
        for name in _COUNTERS:
            setattr(self, name, checkpoint.state[name])

    def save(self, *, last: bool = False) -> None:
        """Checkpoint of the completed steps, by all ranks together; a failed periodic save is counted, not fatal."""
        if self.saved == self.done:
            return
        statistics = {f"reward.{name}": values for name, values in self.parts.rewards.state_dict().items()}
        try:
            save_checkpoint(
                self.run_dir / "checkpoints",
                self.done,
                tensors=self.engine.state() | statistics,
                rank_tensors=rng_tensors(),
                state={name: getattr(self, name) for name in _COUNTERS},
                keep=self.recipe.train.keep_checkpoints,
            )
            self.saved = self.done
        except CheckpointError as error:
            self.failed_saves += 1
            if last:
                raise TrainingFailed(f"the last checkpoint could not be written: {error}") from error
            self.say(f"checkpoint of step {self.done} failed, training goes on: {error}")

    def notes(self) -> list[str]:
        """What a reader of the report should know about the run."""
        rows = [(self.skipped_steps, "steps skipped: loss or gradient not finite"), (self.failed_saves, "saves failed")]
        counts = {**self.parts.rewards.counts, **(self.parts.held_out.counts if self.parts.held_out else {})}
        counted = [f"{name}: {n} pictures {what}" for name, part in counts.items() for what, n in part.items()]
        return [*(f"{count} {what}" for count, what in rows if count), *self.evaluator.alarms, *counted]

    def say(self, text: str) -> None:
        """A line for the person at the terminal, from rank 0."""
        if self.record is not None:
            self.record.message(text)

    def _say_what_ran_slower(self) -> None:
        for note in getattr(self.parts.image_model.unet, "take_notes", list)():
            self.say(note)

    def _evaluation_due(self) -> bool:
        every = self.recipe.evaluate.every
        return bool(every) and self.done % every == 0 and self.done < self.recipe.train.num_steps

    def _was_evaluated(self) -> bool:
        """Whether this step's evaluation is on file; a stop may have come between checkpoint and evaluation."""
        return from_rank_zero(lambda: any(row["step"] == self.done for row in read_evaluations(self.run_dir)))

    def _next(self, losses: Iterator[LossOutput]) -> LossOutput | None:
        """The next loss, once all ranks agree that none was asked to stop: backward is collective."""
        output, stop, full = None, False, False
        try:
            output = next(losses, None)
        except StopRequested:
            stop = True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            full = True
        if output is None and not (stop or full):
            return None  # no more losses; after an update it is too late to leave the step
        self._stop_together(stop)
        if any(agree([full])):
            raise MemoryRanOutError("on one of the ranks")
        return output

    def _stop_together(self, stop: bool) -> None:
        """Raise `StopRequested` on all ranks if one of them was asked to stop; collective."""
        if any(agree([stop or self.interrupt.requested])):
            raise StopRequested(self.interrupt.reason or "another rank was asked to stop")

    def _clones(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.engine.trainable_parameters().items()}

    def _check_training(self, before: dict[str, Tensor], norms: dict[str, float]) -> None:
        """After the first step: every trained group has a gradient and has moved (untrained encoders are a known bug).

        Raises:
            TrainingFailed: naming the groups that have not.
        """
        changes = self.engine.group_changes(before)
        idle = sorted(group for group, change in changes.items() if not change > 0 or not norms[group] > 0)
        if idle:
            raise TrainingFailed(f"after the first step these groups have no gradient or have not moved: {idle}")
        self.checked = True

    def _count_bad(self, skipped: bool) -> None:
        """Skipped steps in a row; past the limit the run ends with the weights of the last good step."""
        self.bad_steps = self.bad_steps + 1 if skipped else 0
        self.skipped_steps += skipped
        if skipped:
            self.say(f"step {self.done}: loss or gradient is not finite, step skipped ({self.bad_steps} in a row)")
        if self.bad_steps >= self.recipe.train.max_bad_steps:
            self.save(last=True)
            raise TrainingFailed(f"{self.bad_steps} steps in a row had a loss or gradient that is not finite")

    def _log(self, outputs: list[LossOutput], result: StepResult, began: float) -> None:
        """One line of metrics.jsonl: means over micro-steps and ranks; only here do numbers leave the device."""
        rows = [torch.stack([output.loss, *output.metrics.values()]).float() for output in outputs]
        values = mean_over_ranks(torch.stack(rows).mean(dim=0)).tolist()
        means = dict(zip(["loss", *outputs[0].metrics], values, strict=True))
        seconds = time.perf_counter() - began
        if self.record is None:
            return
        samples = self.recipe.train.batch_size * self.recipe.train.gradient_accumulation_steps
        self.record.log_step(
            {
                "step": self.done,
                "rewards": {name.removeprefix("reward/"): value for name, value in means.items() if "/" in name},
                **{name: value for name, value in means.items() if "/" not in name},
                "grad_norm": result.grad_norm,
                "lr": result.lr,
                "samples_per_sec_per_gpu": samples / seconds,
                "step_time_s": seconds,
                "peak_memory_mib": peak_memory_mib(self.parts.image_model.device),
                "skipped": result.skipped,
            }
        )


def peak_memory_mib(device: torch.device) -> float:
    """Largest allocation since the last reset by the CUDA allocator, or the process's largest resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
