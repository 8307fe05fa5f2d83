"""The training loop around the engine: rounds of an objective, updates, checkpoints and what is said of them."""

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastcraft.engine.agreement import agree, from_rank_zero, mean_over_ranks
from fastcraft.engine.checkpoint import Checkpoint, CheckpointError, restore_rng, rng_tensors, save_checkpoint
from fastcraft.engine.groups import StepResult
from fastcraft.engine.interrupt import Interrupt, StopRequested
from fastcraft.engine.out_of_memory import MemoryRanOutError, is_out_of_memory
from fastcraft.engine.zero2 import Zero2Engine
from fastcraft.evaluation.record import RunRecord, read_evaluations
from fastcraft.evaluator import Evaluator
from fastcraft.objectives.base import Objective
from fastcraft.recipe import TrainConfig
from fastcraft.records import Loss

_COUNTERS = ("bad_steps", "skipped_steps", "failed_saves", "rounds")  # kept in the checkpoint


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message says why, and the last good checkpoint is on disk."""


class SmallerPlan(Protocol):
    """What can be planned anew with less memory after it ran out."""

    def fall_back(self, backprop_steps: int) -> str | None:
        """Plan with less from now on; says what changed, or None when there is nothing smaller."""


@dataclass(frozen=True, kw_only=True)
class RoundStart:
    """What a round is left with when it cannot be ended: ``weights`` are the engine's, where it may have moved them."""

    done: int
    weights: dict[str, Tensor] | None
    objective: dict[str, Tensor]
    statistics: dict[str, Tensor]
    rng: dict[str, Tensor]
    counters: dict[str, int]


class Trainer:
    """One run on one rank.

    Args:
        train: the recipe's section of that name.
        objective: yields the losses.
        rewards: whose running statistics the checkpoints keep; None = the objective has none.
        engine: around what is trained.
        evaluator: samples and scores in between.
        device: where training runs.
        run_dir: exists, and belongs to this run.
        interrupt: polled before every backward.
        smaller_plan: where to turn when memory runs out; None = nowhere.
        depth: K, of which ``smaller_plan`` is asked.
        record: on rank 0.
    """

    def __init__(
        self,
        train: TrainConfig,
        *,
        objective: Objective,
        rewards: Any,
        engine: Zero2Engine,
        evaluator: Evaluator,
        device: torch.device,
        run_dir: Path,
        interrupt: Interrupt,
        smaller_plan: SmallerPlan | None = None,
        depth: int = 1,
        record: RunRecord | None = None,
    ) -> None:
        self.train = train
        self.objective = objective
        self.rewards = rewards
        self.engine = engine
        self.evaluator = evaluator
        self.device = device
        self.run_dir = run_dir
        self.interrupt = interrupt
        self.smaller_plan = smaller_plan
        self.depth = depth
        self.record = record
        self.done = self.rounds = 0
        self.bad_steps = self.skipped_steps = self.failed_saves = 0
        self.saved = -1
        self.checked = False

    def run(self) -> None:
        """Train to the last update.

        Raises:
            StopRequested: a signal came; the last completed round has been saved.
            TrainingFailed: too many bad updates in a row, or a group of weights that does not learn.
        """
        try:
            self._evaluate_at_start()
            while self.done < self.train.num_steps and not self.evaluator.ended:
                before = self.done
                self.round()
                self._stop_if_bad()
                if _passed(self.train.checkpoint_every, before, self.done):
                    self.save()
                if self._evaluation_due(before):
                    self._evaluate()
            self.save(last=True)
            self._evaluate(closing=True)
        except StopRequested:
            self.save(last=True)
            raise

    def round(self) -> None:
        """One round of the objective, update by update.

        A stop inside it, or too many bad updates, leave the run where the round began: weights between two rounds
        belong to no checkpoint.
        """
        begun = self._round_start()
        try:
            if self._updates_of_a_round():
                self.rounds += 1
            else:
                self._go_back(begun)
        except StopRequested:
            self._go_back(begun)
            for name, count in begun.counters.items():
                setattr(self, name, count)
            raise

    def _round_start(self) -> RoundStart:
        return RoundStart(
            done=self.done,
            weights=self.engine.state() if self.objective.updates_per_round > 1 else None,
            objective={name: values.clone() for name, values in self.objective.state_dict().items()},
            statistics=self._statistics(),
            rng=rng_tensors(),
            counters={name: getattr(self, name) for name in _COUNTERS},
        )

    def _go_back(self, begun: RoundStart) -> None:
        if self.done > begun.done:
            assert begun.weights is not None
            self.engine.load_state(begun.weights)
        self.done = begun.done
        self.objective.load_state_dict(begun.objective)
        if self.rewards is not None:
            self.rewards.load_state_dict(begun.statistics)
        restore_rng(begun.rng)

    def _updates_of_a_round(self) -> bool:
        """Whether the round, or the run, came to its end; else there were too many bad updates."""
        first, per_round = self.done, self.objective.updates_per_round
        began, done = time.perf_counter(), 0
        outputs: list[Loss] = []
        losses = self.objective.round(self.rounds)
        while True:
            self.engine.begin()
            if not outputs:
                self._reset_peak_memory()
            statistics = self._statistics()
            try:
                loss = self._next(losses)
                if loss is None:
                    return True
                result = self._micro_step(loss)
            except MemoryRanOutError:
                loss = None  # it holds what did not fit
                losses = self._begin_again(statistics, done)
                continue
            done += 1
            outputs.append(Loss(loss=loss.loss.detach(), metrics=loss.metrics))
            if loss.closes_update:
                self._close_update(outputs, result, began)
                began, outputs = time.perf_counter(), []
                if self.done - first < per_round:  # after the last update the objective has still to end its round
                    if self._too_bad:
                        return False
                    if self.done >= self.train.num_steps:
                        return True

    def _micro_step(self, loss: Loss) -> StepResult:
        """Backward of one loss and, where it closes an update, the update."""
        watch = loss.closes_update and not self.checked
        before = self.engine.masters() if watch else {}
        self._backward(loss)
        norms = self.engine.group_gradient_norms() if watch else {}
        if self.rewards is not None:
            self.rewards.synchronize()
        result = self.engine.step()
        if watch and not result.skipped:
            self._check_training(before, norms)
        return result

    def _close_update(self, outputs: list[Loss], result: StepResult, began: float) -> None:
        self.done += 1
        self._say_what_ran_slower()
        self._log(outputs, result, began)
        self._count_bad(result.skipped)

    def _backward(self, loss: Loss) -> None:
        """The engine's backward.

        Raises:
            MemoryRanOutError: on every rank, with nothing half done.
            TrainingFailed: memory ran out where gradients of weights are half added up.
        """
        try:
            scaled = loss.loss if loss.share == 1 else loss.loss * loss.share
            self.engine.backward(scaled, closes_update=loss.closes_update)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingFailed(
                "out of memory in the backward pass of a trained part, where gradients are being added up and a step "
                "cannot be begun again; set gradient_checkpointing for the text encoder or give memory.budget_gib "
                f"less: {str(error).splitlines()[0]}"
            ) from error

    def _begin_again(self, statistics: dict[str, Tensor], done: int) -> Iterator[Loss]:
        """The losses of this round from the one that did not fit, planned with less memory from now on; said once.

        Raises:
            TrainingFailed: the plan is not an automatic one, nothing smaller is left, or an update lies between.
        """
        if done and self.objective.updates_per_round > 1:
            raise TrainingFailed("out of memory between two updates of one round")
        if self.smaller_plan is None:
            raise TrainingFailed("out of memory; memory.policy = 'auto' plans with less by itself")
        note = self.smaller_plan.fall_back(self.depth)
        if any(agree([note is None])):
            raise TrainingFailed("out of memory under the smallest plan; take a smaller train.batch_size")
        if self.rewards is not None:
            self.rewards.load_state_dict(statistics)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.say(f"step {self.done + 1}: {note}")
        return self.objective.round(self.rounds, done=done)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint.

        At another world size the default random generators start anew; prompts and noise do not depend on them.
        """
        kinds: dict[str, dict[str, Tensor]] = {"reward.": {}, "objective.": {}, "": {}}
        for name, tensor in checkpoint.tensors.items():
            kind = next(prefix for prefix in kinds if name.startswith(prefix))
            kinds[kind][name.removeprefix(kind)] = tensor
        if self.rewards is not None:
            self.rewards.load_state_dict(kinds["reward."])
        self.objective.load_state_dict(kinds["objective."])
        self.engine.load_state(kinds[""])
        if checkpoint.rank_tensors is not None:
            restore_rng(checkpoint.rank_tensors)
        self.done = self.saved = checkpoint.step
        for name in _COUNTERS:
            setattr(self, name, checkpoint.state[name])

    def save(self, *, last: bool = False) -> None:
        """Checkpoint of the completed rounds, by all ranks together; a failed periodic save is counted, not fatal."""
        if self.saved == self.done:
            return
        tensors = {f"reward.{name}": values for name, values in self._statistics().items()}
        tensors |= {f"objective.{name}": values for name, values in self.objective.state_dict().items()}
        try:
            save_checkpoint(
                self.run_dir / "checkpoints",
                self.done,
                tensors=self.engine.state() | tensors,
                rank_tensors=rng_tensors(),
                state={name: getattr(self, name) for name in _COUNTERS},
                keep=self.train.keep_checkpoints,
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
        return [*(f"{count} {what}" for count, what in rows if count), *self.evaluator.notes()]

    def say(self, text: str) -> None:
        """A line for the person at the terminal, from rank 0."""
        if self.record is not None:
            self.record.message(text)

    def stop_together(self, stop: bool) -> None:
        """Raise `StopRequested` on all ranks if one of them was asked to stop; collective."""
        if any(agree([stop or self.interrupt.requested])):
            raise StopRequested(self.interrupt.reason or "another rank was asked to stop")

    def _statistics(self) -> dict[str, Tensor]:
        if self.rewards is None:
            return {}
        return {name: values.clone() for name, values in self.rewards.state_dict().items()}

    def _say_what_ran_slower(self) -> None:
        for note in self.evaluator.what_ran_slower():
            self.say(note)

    def _evaluate_at_start(self) -> None:
        if self.done == 0:
            self._evaluate(closing=True)
        elif self._evaluation_due(max(self.done - self.objective.updates_per_round, 0)) and not self._was_evaluated():
            self._evaluate()
        else:
            self.evaluator.watch(self.done)  # a run that was ended stays ended

    def _evaluate(self, *, closing: bool = False) -> None:
        """Pictures by the averaged weights where there are such; ``closing``: before the first and after the last."""
        with self.engine.averaged():
            self.evaluator.evaluate(self.done, closing=closing)

    def _evaluation_due(self, before: int) -> bool:
        return _passed(self.evaluator.every, before, self.done) and self.done < self.train.num_steps

    def _was_evaluated(self) -> bool:
        """Whether this step's evaluation is on file; a stop may have come between checkpoint and evaluation."""
        return from_rank_zero(lambda: any(row["step"] == self.done for row in read_evaluations(self.run_dir)))

    def _next(self, losses: Iterator[Loss]) -> Loss | None:
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
            return None  # no more losses; after an update it is too late to leave the round
        self.stop_together(stop)
        if any(agree([full])):
            raise MemoryRanOutError("on one of the ranks")
        return output

    def _check_training(self, before: Mapping[str, Tensor], norms: Mapping[str, float]) -> None:
        """After the first step: every trained group has a gradient and has moved (untrained encoders are a known bug).

        Raises:
            TrainingFailed: naming the groups that have not.
        """
        changes = self.engine.group_changes(before)
        moved = dict(zip(changes, agree([change > 0 for change in changes.values()]), strict=True))
        idle = sorted(group for group in norms if not moved.get(group) or not norms[group] > 0)
        if idle:
            raise TrainingFailed(f"after the first step these groups have no gradient or have not moved: {idle}")
        self.checked = True

    def _count_bad(self, skipped: bool) -> None:
        """Skipped steps in a row; at the limit the run ends with the weights of the last good step."""
        self.bad_steps = self.bad_steps + 1 if skipped else 0
        self.skipped_steps += skipped
        if skipped:
            self.say(f"step {self.done}: loss or gradient is not finite, step skipped ({self.bad_steps} in a row)")

    @property
    def _too_bad(self) -> bool:
        return self.bad_steps >= self.train.max_bad_steps

    def _stop_if_bad(self) -> None:
        if self._too_bad:
            self.save(last=True)
            raise TrainingFailed(f"{self.bad_steps} steps in a row had a loss or gradient that is not finite")

    def _reset_peak_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _log(self, outputs: list[Loss], result: StepResult, began: float) -> None:
        """One line of metrics.jsonl: means over micro-steps and ranks; only here do numbers leave the device."""
        rows = [torch.stack([output.loss, *output.metrics.values()]).float() for output in outputs]
        values = mean_over_ranks(torch.stack(rows).mean(dim=0)).tolist()
        means = dict(zip(["loss", *outputs[0].metrics], values, strict=True))
        seconds = time.perf_counter() - began
        if self.record is None:
            return
        first, *others = result.lr.items()
        self.record.log_step(
            {
                "step": self.done,
                "rewards": {name.removeprefix("reward/"): value for name, value in means.items() if "/" in name},
                **{name: value for name, value in means.items() if "/" not in name},
                "grad_norm": result.grad_norm,
                "lr": first[1],
                **{f"lr_{name}": rate for name, rate in others},
                "samples_per_sec_per_gpu": self.train.batch_size * len(outputs) / seconds,
                "step_time_s": seconds,
                "peak_memory_mib": peak_memory_mib(self.device),
                "skipped": result.skipped,
            }
        )


def _passed(every: int, before: int, now: int) -> bool:
    """Whether a multiple of ``every`` lies above ``before`` and at or below ``now``; never for 0."""
    return bool(every) and now // every > before // every


def peak_memory_mib(device: torch.device) -> float:
    """Largest allocation since the last reset by the CUDA allocator, or the process's largest resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
