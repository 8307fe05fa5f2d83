"""Evaluation during a run: pictures on fixed prompts and seeds, their scores, and the watch over held-out rewards."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastcraft.assemble import Parts
from fastcraft.data.order import sample_seed
from fastcraft.engine.agreement import from_rank_zero, gather, rank, world_size
from fastcraft.engine.interrupt import StopRequested
from fastcraft.evaluation.held_out import FALLING, GRID, falling, held_out_means
from fastcraft.evaluation.record import RunRecord, read_evaluations
from fastcraft.evaluation.scores import evaluate_pictures
from fastcraft.recipe import Recipe
from fastcraft.text.prompt_encoder import PromptEncoder

_SAMPLE_STREAM = 7  # noise stream of the sampled pictures: the same at every evaluation


class Evaluator:
    """Samples and scores on one rank; rank 0 writes down what comes out.

    Args:
        recipe: the resolved recipe.
        parts: what `assemble` built from it.
        text: encodes the prompts.
        stop_together: raises `StopRequested` on all ranks if one was asked to stop; collective.
        record: on rank 0.
    """

    def __init__(
        self,
        recipe: Recipe,
        parts: Parts,
        *,
        text: PromptEncoder,
        stop_together: Callable[[bool], None],
        record: RunRecord | None,
    ) -> None:
        self.recipe = recipe
        self.parts = parts
        self.text = text
        self.stop_together = stop_together
        self.record = record
        self.alarms: list[str] = []
        self._grid: tuple[int, dict[str, float]] = (-1, {})
        self.ended = False
        """Whether the held-out rewards have ended the run."""

    @torch.no_grad()
    def evaluate(self, step: int, num_samples: int = 0) -> None:
        """Sample the fixed prompts, all ranks together; rank 0 scores the pictures and keeps the grid.

        Args:
            step: optimiser steps done.
            num_samples: pictures of the exam before and after the run; 0 = those of the grid, in between.
        """
        evaluate = self.recipe.evaluate
        prompts = self.parts.evaluation_prompts[: num_samples or evaluate.num_samples]
        pictures = self.sample(prompts)
        if self.record is not None and pictures is not None:
            scores = self._scores(pictures.to(self.parts.image_model.device), prompts)
            if not num_samples:  # other pictures than those before and after the run: another series
                scores = {GRID + name: value for name, value in scores.items()}
                if self.parts.held_out is not None:
                    scores[GRID + FALLING] = float(len(self._falling(scores)))
                self._grid = (step, scores)
            elif self._grid[0] == step:  # one line for each step is read: a run that ended early keeps both series
                scores = {**self._grid[1], **scores}
            self.record.log_evaluation(step, scores)
            shown = evaluate.num_samples
            self.record.log_samples(step, pictures[:shown], prompts[:shown])
        if not num_samples:
            self.watch(step)

    def watch(self, step: int) -> None:
        """Say which held-out rewards fall while the trained total rises, and end the run if so wished; collective."""
        if self.parts.held_out is None:
            return
        names = from_rank_zero(self._falling)
        if not names:
            return
        evaluate = self.recipe.evaluate
        self.ended = evaluate.held_out_action == "stop"
        alarm = (
            f"step {step}: held out {', '.join(names)} fell while the trained total rose, "
            f"{evaluate.held_out_patience} evaluations in a row{'; the run ends here' if self.ended else ''}"
        )
        self.alarms.append(alarm)
        if self.record is not None:
            self.record.message(alarm)

    def _falling(self, newest: dict[str, float] | None = None) -> list[str]:
        """On rank 0: of the evaluations on file, and of one that is not yet."""
        assert self.record is not None
        rows = [row["evaluation"] for row in read_evaluations(self.record.run_dir)]
        return falling([*rows, *([newest] if newest else [])], patience=self.recipe.evaluate.held_out_patience)

    def _scores(self, pictures: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        size, held_out = self.recipe.evaluate.batch_size, self.parts.held_out
        scores = evaluate_pictures(
            pictures, prompts, rewards=self.parts.rewards, exam=self.parts.exam, micro_batch=size
        )
        if held_out is not None:
            scores |= held_out_means(pictures, prompts, rewards=held_out, micro_batch=size)
        return scores

    def sample(self, prompts: Sequence[str]) -> Tensor | None:
        """Pictures ``(N, 3, H, W)`` on the CPU, shared out over the ranks; None except on rank 0."""
        mine = list(range(rank(), len(prompts), world_size()))
        size, chunks, stop = self.recipe.evaluate.batch_size, [], False
        try:
            for first in range(0, len(mine), size):
                indices = mine[first : first + size]
                chunks.append(self._sample_chunk(indices, [prompts[index] for index in indices]))
        except StopRequested:
            stop = True
        self.stop_together(stop)
        gathered = gather((mine, torch.cat(chunks) if chunks else []))
        if gathered is None:
            return None
        pictures = {index: row for indices, rows in gathered for index, row in zip(indices, rows, strict=True)}
        return torch.stack([pictures[index] for index in range(len(prompts))])

    def _sample_chunk(self, indices: Sequence[int], prompts: Sequence[str]) -> Tensor:
        trained_steps = self.recipe.evaluate.trained_steps
        pictures = self.parts.image_model.sample(
            self.text.trained(prompts),
            seeds=[sample_seed(self.recipe.train.seed, index, _SAMPLE_STREAM) for index in indices],
            prefix=self.text.original(prompts) if trained_steps else None,
            trained_steps=trained_steps,
            decode_micro_batch=self.recipe.memory.decode_micro_batch,
        )
        return pictures.cpu()
