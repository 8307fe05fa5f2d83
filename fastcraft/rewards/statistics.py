"""Running mean and standard deviation of several scores, over all batches and ranks.

Shape letters: R rewards, B images.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class RunningStatistics:
    """Count, mean and sum of squared deviations per reward, merged batch by batch.

    Kept in float64 on the device of the scores; nothing is read back to the host. Scores that are NaN or infinite are
    left out, so one bad step does not spoil the rest of the run. `update` is local, because a rank that was asked to
    stop leaves its step before the rewards; `synchronize` is where ranks meet, once per step.

    Args:
        names: of the R rewards.
        floor: smallest standard deviation that is reported.

    Source: Chan, Golub, LeVeque 1979, equation 1.5 (merging two samples).
    """

    def __init__(self, names: Sequence[str], *, floor: float) -> None:
        self.names = list(names)
        self.floor = floor
        self.values = torch.zeros(3, len(self.names), dtype=torch.float64)  # count, mean, m2: what all ranks have
        self._pending: Tensor | None = None  # (3, R) counts, sums, sums of squares of this rank since `synchronize`

    def update(self, scores: Tensor) -> None:
        """Take in ``(R, B)`` scores of this rank."""
        scores = scores.detach().double()
        good = torch.isfinite(scores)
        scores = torch.where(good, scores, 0.0)
        sums = torch.stack([good.double().sum(dim=1), scores.sum(dim=1), scores.square().sum(dim=1)])  # (3, R)
        self._pending = sums if self._pending is None else self._pending + sums

    def synchronize(self) -> None:
        """Make the scores since the last call those of all ranks; collective, and nothing when no rank took any in."""
        if self._pending is None:
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._pending)
        self.values, self._pending = self._merged(self._pending.device), None

    def _merged(self, device: torch.device) -> Tensor:
        """``values`` with this rank's pending scores."""
        count, mean, m2 = values = self.values.to(device)
        if self._pending is None:
            return values
        new_count, new_sum, new_square = self._pending.to(device)
        new_mean = new_sum / new_count.clamp(min=1)
        new_m2 = (new_square - new_count * new_mean.square()).clamp(min=0)
        both = count + new_count
        share = new_count / both.clamp(min=1)
        shift = new_mean - mean
        return torch.stack([both, mean + shift * share, m2 + new_m2 + shift.square() * count * share])

    def std(self, device: torch.device) -> Tensor:
        """``(R,)`` float64 standard deviations (divisor n) of all scores, this rank's newest included.

        At least ``floor``; 1 with fewer than two scores.
        """
        count, _, m2 = self._merged(device)
        std = (m2 / count.clamp(min=1)).sqrt().clamp(min=self.floor)
        return torch.where(count < 2, torch.ones_like(std), std)

    def state_dict(self) -> dict[str, Tensor]:
        """Name -> ``(3,)`` float64 on the CPU: count, mean, sum of squared deviations; what was synchronized."""
        return {name: self.values[:, i].detach().cpu().clone() for i, name in enumerate(self.names)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`."""
        self.values = torch.stack([state[name].double() for name in self.names], dim=1)
        self._pending = None
