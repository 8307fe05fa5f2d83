"""Evaluation during a run: pictures on fixed prompts and seeds, their scores, and the watch over held-out rewards."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcraft.data.order import sample_seed
from fastcraft.engine.agreement import from_rank_zero, gather, rank, world_size
from fastcraft.engine.interrupt import StopRequested
from fastcraft.evaluation.held_out import FALLING, GRID, falling, held_out_means
from fastcraft.evaluation.record import RunRecord, read_evaluations
from fastcraft.evaluation.scores import Exam, evaluate_pictures
from fastcraft.families.image_model import ImageModel
from fastcraft.recipe import EvaluateConfig

_SAMPLE_STREAM = 7  # noise stream of the sampled pictures: the same at every evaluation


class Evaluator:
    """Samples and scores on one rank; rank 0 writes down what comes out.

    Args:
        settings: the recipe's section [evaluate].
        model: makes the pictures.
        prompts: as many as the largest evaluation has pictures.
        rewards: that are trained on, as `WeightedRewards`.
        held_out: that are not, likewise.
        exam: scores of another kind.
        seed: of the run.
        stop_together: raises `StopRequested` on all ranks if one was asked to stop; collective.
        decode_micro_batch: pictures decoded at once; 0 = all.
        record: on rank 0.
    """

    def __init__(
        self,
        settings: EvaluateConfig,
        *,
        model: ImageModel,
        prompts: Sequence[str],
        rewards: Any,
        seed: int,
        held_out: Any = None,
        exam: Exam | None = None,
        stop_together: Callable[[bool], None] = lambda stop: None,
        decode_micro_batch: int = 0,
        record: RunRecord | None = None,
    ) -> None:
        self.settings = settings
        self.model = model
        self.prompts = prompts
        self.rewards = rewards
        self.held_out = held_out
        self.exam = exam
        self.seed = seed
        self.stop_together = stop_together
        self.decode_micro_batch = decode_micro_batch
        self.record = record
        self.alarms: list[str] = []
        self._grid: tuple[int, dict[str, float]] = (-1, {})
        self.ended = False
        """Whether the held-out rewards have ended the run."""

    @property
    def every(self) -> int:
        """Updates between evaluations; 0 = none between the first and the last."""
        return self.settings.every

    @torch.no_grad()
    def evaluate(self, step: int, *, closing: bool = False) -> None:
        """Sample the fixed prompts, all ranks together; rank 0 scores the pictures and keeps the grid.

        Args:
            step: updates done.
            closing: with the pictures of the exam, before the first and after the last update; else those of the grid.
        """
        shown = self.settings.num_samples
        prompts = self.prompts[: max(self.settings.exam_num_samples, shown) if closing else shown]
        pictures = self.sample(prompts)
        if self.record is not None and pictures is not None:
            scores = self._scores(pictures.to(self.model.device), prompts)
            if not closing:  # other pictures than those before and after the run: another series
                scores = {GRID + name: value for name, value in scores.items()}
                if self.held_out is not None:
                    scores[GRID + FALLING] = float(len(self._falling(scores)))
                self._grid = (step, scores)
            elif self._grid[0] == step:  # one line for each step is read: a run that ended early keeps both series
                scores = {**self._grid[1], **scores}
            self.record.log_evaluation(step, scores)
            self.record.log_samples(step, pictures[:shown], prompts[:shown])
        if not closing:
            self.watch(step)

    def watch(self, step: int) -> None:
        """Say which held-out rewards fall while the trained total rises, and end the run if so wished; collective."""
        if self.held_out is None:
            return
        names = from_rank_zero(self._falling)
        if not names:
            return
        self.ended = self.settings.held_out_action == "stop"
        alarm = (
            f"step {step}: held out {', '.join(names)} fell while the trained total rose, "
            f"{self.settings.held_out_patience} evaluations in a row{'; the run ends here' if self.ended else ''}"
        )
        self.alarms.append(alarm)
        if self.record is not None:
            self.record.message(alarm)

    def notes(self) -> list[str]:
        """What a reader of the report should know: alarms, and what the rewards have counted."""
        counts = {**self.rewards.counts, **(self.held_out.counts if self.held_out is not None else {})}
        counted = [f"{name}: {n} pictures {what}" for name, part in counts.items() for what, n in part.items()]
        return [*self.alarms, *counted]

    def what_ran_slower(self) -> list[str]:
        """What of the denoiser has run slower than asked for since the last time."""
        return getattr(self.model.network.module, "take_notes", list)()

    def _falling(self, newest: dict[str, float] | None = None) -> list[str]:
        """On rank 0: of the evaluations on file, and of one that is not yet."""
        assert self.record is not None
        rows = [row["evaluation"] for row in read_evaluations(self.record.run_dir)]
        return falling([*rows, *([newest] if newest else [])], patience=self.settings.held_out_patience)

    def _scores(self, pictures: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        size = self.settings.batch_size
        scores = evaluate_pictures(pictures, prompts, rewards=self.rewards, exam=self.exam, micro_batch=size)
        if self.held_out is not None:
            scores |= held_out_means(pictures, prompts, rewards=self.held_out, micro_batch=size)
        return scores

    def sample(self, prompts: Sequence[str]) -> Tensor | None:
        """Pictures ``(N, 3, H, W)`` on the CPU, shared out over the ranks; None except on rank 0."""
        indices = list(range(rank(), len(prompts), world_size()))
        size, chunks, stop = self.settings.batch_size, [], False
        try:
            for first in range(0, len(indices), size):
                chunk = indices[first : first + size]
                chunks.append(self._sample_chunk(chunk, [prompts[index] for index in chunk]))
        except StopRequested:
            stop = True
        self.stop_together(stop)
        gathered = gather((indices, torch.cat(chunks) if chunks else []))
        if gathered is None:
            return None
        pictures = {index: row for numbers, rows in gathered for index, row in zip(numbers, rows, strict=True)}
        return torch.stack([pictures[index] for index in range(len(prompts))])

    def _sample_chunk(self, indices: Sequence[int], prompts: Sequence[str]) -> Tensor:
        trained_steps = self.settings.trained_steps
        pictures = self.model.sample(
            self.model.encode(prompts, by="trained"),
            seeds=[sample_seed(self.seed, index, _SAMPLE_STREAM) for index in indices],
            prefix=self.model.encode(prompts, by="original") if trained_steps else None,
            trained_steps=trained_steps,
            decode_micro_batch=self.decode_micro_batch,
        )
        return pictures.cpu()
