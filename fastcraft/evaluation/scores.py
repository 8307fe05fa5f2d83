"""Scores of pictures: rewards and an exam over a set, how sure the means are, and before against after."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcraft.errors import UserError
from fastcraft.records import RewardOutput

Rewards = Callable[[Tensor, Sequence[str]], RewardOutput]
Exam = Callable[[Tensor, Sequence[str]], Mapping[str, float]]
REWARD = "reward/"
REWARD_SE = "reward_se/"


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """A mean and how sure it is."""

    mean: float
    standard_error: float
    """NaN for a single value."""
    low: float
    """Lower end of the bootstrapped 95 % interval of the mean."""
    high: float
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One metric before and after; None where it was not measured or is not finite."""

    name: str
    before: float | None
    after: float | None
    difference: float | None
    before_se: float | None = None
    after_se: float | None = None


def summarize(values: Tensor, *, num_resamples: int = 2000, seed: int = 0) -> Summary:
    """Mean, standard error and percentile bootstrap interval.

    Args:
        values: (N,) of any dtype, N at least 1; a NaN among them makes every figure NaN.
        num_resamples: means drawn with replacement.

    Source: Efron 1979, doi:10.1214/aos/1176344552; the interval is the 2.5 and 97.5 percentile.
    """
    values = values.detach().double().flatten().cpu()
    count = len(values)
    if not count:
        raise ValueError("values must hold at least one number, got 0")
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack(
        [values[torch.randint(count, (count,), generator=generator)].mean() for _ in range(num_resamples)]
    )
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    error = (values.std() / math.sqrt(count)).item() if count > 1 else math.nan
    return Summary(mean=values.mean().item(), standard_error=error, low=low, high=high, count=count)


@torch.no_grad()
def score_pictures(images: Tensor, prompts: Sequence[str], *, rewards: Rewards, micro_batch: int) -> dict[str, Tensor]:
    """Raw scores of every picture.

    Args:
        images: (B, 3, H, W) floating point in [0, 1].
        prompts: B texts.
        micro_batch: pictures scored at once, at least 1.

    Returns:
        ``total`` and each reward's name -> (B,) float32 on the CPU.
    """
    _check(images, prompts, micro_batch)
    collected: dict[str, list[Tensor]] = {}
    for start in range(0, len(prompts), micro_batch):
        part = slice(start, start + micro_batch)
        output = rewards(images[part], list(prompts[part]))
        for name, scores in {"total": output.total, **output.parts}.items():
            collected.setdefault(name, []).append(scores.detach().float().cpu())
    return {name: torch.cat(parts) for name, parts in collected.items()}


def evaluate_pictures(
    images: Tensor,
    prompts: Sequence[str],
    *,
    rewards: Rewards | None = None,
    exam: Exam | None = None,
    micro_batch: int,
) -> dict[str, float]:
    """Means of the rewards and the exam's figures in one flat table.

    Args:
        images: (B, 3, H, W) floating point in [0, 1].
        prompts: B texts.
        rewards: (images, prompts) -> `RewardOutput`; called on ``micro_batch`` pictures at a time.
        exam: (images, prompts) -> {name: number}; called once on all pictures, as its figures need not be means.

    Returns:
        ``reward/total``, ``reward/<name>`` (means), ``reward_se/<name>`` (standard errors, from 2 pictures on) and the
        exam's own names.

    Raises:
        UserError: the exam uses a name that belongs to the rewards, or returns something that is no number.
    """
    _check(images, prompts, micro_batch)
    table: dict[str, float] = {}
    if rewards is not None:
        for name, scores in score_pictures(images, prompts, rewards=rewards, micro_batch=micro_batch).items():
            table[REWARD + name] = scores.double().mean().item()
            if len(scores) > 1:
                table[REWARD_SE + name] = (scores.double().std() / math.sqrt(len(scores))).item()
    if exam is not None:
        with torch.no_grad():
            figures = exam(images, list(prompts))
        for name, figure in figures.items():
            if name.startswith((REWARD, REWARD_SE)):
                raise UserError(f"an exam must not use names that begin with {REWARD!r}, got {name!r}")
            try:
                table[name] = float(figure)
            except (TypeError, ValueError) as error:
                raise UserError(f"an exam must return numbers, got {name} = {figure!r}") from error
    return table


def _check(images: Tensor, prompts: Sequence[str], micro_batch: int) -> None:
    if len(images) != len(prompts):
        raise ValueError(f"prompts must be one for each of the {len(images)} images, got {len(prompts)}")
    if micro_batch < 1:
        raise ValueError(f"micro_batch must be at least 1, got {micro_batch}")


def compare(before: Mapping[str, float | None], after: Mapping[str, float | None]) -> list[Comparison]:
    """Rows of the before/after table, in order of first mention; standard errors join the row of their reward."""
    rows = []
    for name in dict.fromkeys([*before, *after]):
        if name.startswith(REWARD_SE):
            continue
        error = REWARD_SE + name.removeprefix(REWARD) if name.startswith(REWARD) else ""
        first, last = _finite(before.get(name)), _finite(after.get(name))
        rows.append(
            Comparison(
                name=name,
                before=first,
                after=last,
                difference=None if first is None or last is None else last - first,
                before_se=_finite(before.get(error)),
                after_se=_finite(after.get(error)),
            )
        )
    return rows


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
