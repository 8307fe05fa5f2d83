"""The peak of a chain of two treatments in closed form, for the planner, which asks for thousands of them."""

from collections.abc import Sequence

from fastcraft.forecast.estimate import StepEstimate


class ChainPeak:
    """The peak of a chain at one batch.

    Args:
        estimate: what every treatment takes.
        batch: B.
        first_only: no step's latents carry gradient; see `Cost`.
    """

    def __init__(self, estimate: StepEstimate, batch: int, *, first_only: bool) -> None:
        self.estimate, self.batch, self.first_only = estimate, batch, first_only
        self.text, self.kv = estimate.text.held.at(batch), estimate.kv_bytes.at(batch)
        self.floor = estimate.floor_bytes(batch)
        self._costs = {
            name: (
                cost.step_bytes(batch, first=first_only),
                cost.step_bytes(batch, first=True),
                cost.forward_peak.at(batch),
            )
            for name, cost in estimate.steps.items()
        }

    def held(self, name: str) -> int:
        """Bytes that a step under treatment ``name`` keeps."""
        return self._costs[name][0][0]

    def peak(self, steps: Sequence[str]) -> tuple[int, int]:
        """(bytes above the static ones at the highest point outside the decode, bytes saved by all steps).

        Bytes rise from step to step within a treatment, so the last of each, and the last but one of all, decide.
        """
        last = len(steps) - 1
        turn = steps.count(steps[0]) - 1  # the last step of the first treatment
        first_held = self._costs[steps[0]][1][0]

        def saved(index: int) -> int:
            """Bytes saved by the steps up to and with ``index``."""
            light = min(index, turn)
            return first_held + light * self.held(steps[0]) + max(0, index - turn) * self.held(steps[-1])

        peak = self.floor
        for index in {0, turn, max(0, last - 1), last}:
            (_, extra), (_, first_extra), forward = self._costs[steps[index]]
            before = saved(index - 1) if index else 0
            grads = self.estimate.weight_gradient_bytes + (self.kv if index < last else 0)
            backward = saved(index) + (extra if index else first_extra) + grads
            peak = max(peak, self.text + before + forward, self.text + backward)
        return peak, saved(last)
