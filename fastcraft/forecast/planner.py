"""``auto``: the checkpoint plan that takes the least predicted time among those that fit.

The steps of a chain are alike, so only the number of steps under each treatment counts, and a mixture of two treatments
reaches the optimum of the relaxed problem: every pair and every split is tried. Steps that store more come last, where
their activations live shortest. Steps that do not wait for each other (a stop-gradient on the UNet's input) may also be
recomputed in batches; a plan of such batches is weighed whole.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from fastcraft.errors import UserError
from fastcraft.forecast.cards import CARDS, Card
from fastcraft.forecast.chain import ChainPeak
from fastcraft.forecast.cost import Cost, work_seconds
from fastcraft.forecast.estimate import Prediction, StepEstimate
from fastcraft.memory.plan import RECOMPUTE, CheckpointPlan

BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Batches per device that are tried when the batch is free."""
STEP_DOWN = 0.9
"""After an out-of-memory error the next plan must be predicted to take at most this share of the one that failed."""


class DoesNotFitError(UserError):
    """No plan fits; the message says by how much, and what would."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One plan weighed: the bytes and seconds of a micro-step of ``batch_size`` samples."""

    plan: CheckpointPlan
    batch_size: int
    peak_bytes: int
    seconds: float

    @property
    def samples_per_sec(self) -> float:
        """Predicted, of one device."""
        return self.batch_size / self.seconds

    def describe(self) -> str:
        """See `describe`."""
        return describe(self.plan, batch_size=self.batch_size)


def describe(plan: CheckpointPlan, *, batch_size: int) -> str:
    """The treatments with their numbers, in order: ``3 recompute + 2 keep; decode keep, 4 at once``."""
    runs: list[tuple[str, int]] = []
    for name in plan.steps:
        if runs and runs[-1][0] == name:
            runs[-1] = (name, runs[-1][1] + 1)
        else:
            runs.append((name, 1))
    steps = " + ".join(f"{count} {name}" for name, count in runs)
    together = f" in segments of {max(plan.segments)}" if plan.segments else ""
    together += f" in batches of {plan.batched}" if plan.batched else ""
    return f"{steps}{together}; decode {plan.decode}, {plan.decode_micro_batch or batch_size} at once"


class Planner:
    """Weighs plans for one estimate on one card.

    Args:
        estimate: what every phase takes.
        card: rates, and the memory that `budget_bytes` is taken from when it is not given.
        num_inference_steps: T.
        input_grad: see `Trajectory`.
        budget_bytes: bytes that tensors may take at the peak; None = those of the card.
        decode_micro_batch: pictures decoded at once; 0 = free to choose.
        batches: whether steps that do not wait for each other may be recomputed in batches.
    """

    def __init__(
        self,
        estimate: StepEstimate,
        card: Card,
        *,
        num_inference_steps: int,
        input_grad: bool = True,
        budget_bytes: int | None = None,
        decode_micro_batch: int = 0,
        batches: bool = True,
    ) -> None:
        self.estimate = estimate
        self.card = card
        self.num_inference_steps = num_inference_steps
        self.input_grad = input_grad
        self.budget_bytes = card.budget_bytes if budget_bytes is None else budget_bytes
        self.decode_micro_batch = decode_micro_batch
        self.batches = batches
        self._frontiers: dict[tuple[int, int], list[Choice]] = {}

    def choose(self, backprop_steps: int, *, batch_sizes: Iterable[int] = BATCH_SIZES) -> Choice:
        """The choice with the most predicted samples/s.

        Args:
            backprop_steps: K.
            batch_sizes: those that may be chosen.

        Raises:
            DoesNotFitError: not even the least plan fits at the least batch.
        """
        batches = sorted(batch_sizes)
        best: Choice | None = None
        for batch in batches:
            fitting = next(
                (c for c in self.frontier(backprop_steps, batch_size=batch) if c.peak_bytes <= self.budget_bytes), None
            )
            if fitting is None:
                break  # a larger batch takes more still
            if best is None or fitting.samples_per_sec > best.samples_per_sec:
                best = fitting
        if best is None:
            raise DoesNotFitError(self._why_not(backprop_steps, batches[0]))
        return best

    def frontier(self, backprop_steps: int, *, batch_size: int) -> list[Choice]:
        """Choices that no other beats in both time and memory, fastest first, whatever the budget."""
        key = (backprop_steps, batch_size)
        if key not in self._frontiers:
            choices = sorted(self._choices(backprop_steps, batch_size), key=lambda c: (c.seconds, c.peak_bytes))
            front: list[Choice] = []
            for choice in choices:
                if not front or choice.peak_bytes < front[-1].peak_bytes:
                    front.append(choice)
            self._frontiers[key] = front
        return self._frontiers[key]

    def predict(self, choice: Choice) -> Prediction:
        """The choice in full: bytes by kind, seconds by phase."""
        return self.estimate.predict(
            choice.plan, batch_size=choice.batch_size, num_inference_steps=self.num_inference_steps, card=self.card,
            input_grad=self.input_grad,
        )  # fmt: skip

    def weigh(self, plan: CheckpointPlan, *, batch_size: int) -> Choice:
        """Any plan, whether it fits or not."""
        choice = Choice(plan=plan, batch_size=batch_size, peak_bytes=0, seconds=0.0)
        full = self.predict(choice)
        return replace(choice, peak_bytes=full.peak_bytes, seconds=full.seconds)

    def step_down(self, backprop_steps: int, *, batch_size: int) -> Choice | None:
        """After the chosen plan ran out of memory: lower the budget to `STEP_DOWN` of what it was predicted to take.

        Returns:
            The next choice, or None when there is no smaller one; the budget then stays.
        """
        failed = self.choose(backprop_steps, batch_sizes=[batch_size])
        limit = int(failed.peak_bytes * STEP_DOWN)
        smaller = [c for c in self.frontier(backprop_steps, batch_size=batch_size) if c.peak_bytes <= limit]
        if not smaller:
            return None
        self.budget_bytes = limit
        return smaller[0]

    def _choices(self, depth: int, batch: int) -> Iterator[Choice]:
        """Every pair of treatments and every split, every size of batches; all with every way to decode."""
        frozen, text = self._frozen_seconds(depth, batch), self.estimate.text.held.at(batch)
        heads = self._heads(batch)
        chains = [*self._mixtures(depth, batch), *self._batches(depth, batch)]
        for chain, peak, saved, seconds in chains:
            for head_seconds, head_bytes, decode, chunk in heads:
                plan = replace(chain, decode=decode, decode_micro_batch=chunk)
                total = self.estimate.static_bytes + max(peak, text + saved + head_bytes)
                time = frozen + seconds + head_seconds
                yield Choice(plan=plan, batch_size=batch, peak_bytes=total, seconds=time)

    def _mixtures(self, depth: int, batch: int) -> Iterator[tuple[CheckpointPlan, int, int, float]]:
        """(plan, peak outside the decode, bytes saved, seconds of its steps) of pairs of treatments."""
        chain = ChainPeak(self.estimate, batch, first_only=not self.input_grad)
        names = sorted(self._available(batch), key=chain.held)
        seconds = {name: self._seconds(self.estimate.steps[name], batch) for name in names}
        host = {name: self.estimate.steps[name].host.at(batch) for name in names}
        for i, light in enumerate(names):
            for heavy in names[i:]:
                for count in range(1, depth) if light != heavy else (depth,):
                    if count * host[light] + (depth - count) * host[heavy] > self.card.host_bytes:
                        continue
                    steps = (light,) * count + (heavy,) * (depth - count)
                    peak, saved = chain.peak(steps)
                    time = count * seconds[light] + (depth - count) * seconds[heavy]
                    yield CheckpointPlan(steps=steps), peak, saved, time

    def _available(self, batch: int) -> list[str]:
        """Treatments that the card can carry out."""
        steps = self.estimate.steps
        return [name for name, cost in steps.items() if not cost.host.at(batch) or self.card.host_bandwidth]

    def _batches(self, depth: int, batch: int) -> Iterator[tuple[CheckpointPlan, int, int, float]]:
        """The same of steps in batches, if they may be; of sizes that give the same number of batches the smallest."""
        if self.input_grad or not self.batches or RECOMPUTE not in self.estimate.steps:
            return
        for size in sorted({-(-depth // number) for number in range(1, depth)}):
            plan = CheckpointPlan(steps=(RECOMPUTE,) * depth, batched=size)
            peak, saved = self.estimate.chain_bytes(plan, batch_size=batch, input_grad=self.input_grad)
            regions = self.estimate.regions(plan)
            once = {name: self._seconds(cost, batch) for name, cost in dict(regions).items()}
            yield plan, peak, saved, sum(once[name] for name, _ in regions)

    def _heads(self, batch: int) -> list[tuple[float, int, str, int]]:
        """(seconds, bytes, treatment, pictures at once; 0 = all), those that no other beats in both."""
        fixed = min(self.decode_micro_batch, batch)
        sizes = [fixed] if fixed else [*(size for size in BATCH_SIZES if size < batch), batch]
        rows = []
        for name, cost in self.estimate.heads.items():
            for size in sizes:
                calls = -(-batch // size)
                time = calls * self._seconds(cost, size)
                rows.append((time, self.estimate.head_bytes(name, size), name, 0 if size == batch else size))
        rows.sort(key=lambda row: row[:2])
        front: list[tuple[float, int, str, int]] = []
        for row in rows:
            if not front or row[1] < front[-1][1]:
                front.append(row)
        return front

    def _seconds(self, cost: Cost, batch: int) -> float:
        return sum(work_seconds(w, self.card, dtype=self.estimate.dtype, samples=batch) for w in cost.works)

    def _frozen_seconds(self, depth: int, batch: int) -> float:
        steps = self.num_inference_steps - depth
        return self._seconds(self.estimate.text, batch) + steps * self._seconds(self.estimate.prefix, batch)

    def _why_not(self, depth: int, batch: int) -> str:
        least = self.frontier(depth, batch_size=batch)[-1]
        cards = [card.name for card in CARDS.values() if card.budget_bytes >= least.peak_bytes]
        smaller = [size for size in BATCH_SIZES if size < batch]
        fits = [s for s in smaller if self.frontier(depth, batch_size=s)[-1].peak_bytes <= self.budget_bytes]
        remedies = [f"batch {fits[-1]} would fit here"] if fits else []
        remedies.append(f"it would fit {', '.join(cards)}" if cards else "it would fit none of the cards known by name")
        need, budget = least.peak_bytes / 2**30, self.budget_bytes / 2**30
        return (
            f"nothing fits on {self.card.name}: batch {batch} at depth {depth} takes at least {need:.2f} GiB "
            f"({least.describe()}), the budget is {budget:.2f} GiB, short by {need - budget:.2f} GiB; "
            f"{'; '.join(remedies)}"
        )


class AutoPlan:
    """The planner as a training run uses it: one batch, a depth that may vary, and a way down when memory runs out.

    Args:
        planner: with the run's budget.
        batch_size: samples of a micro-step.
    """

    def __init__(self, planner: Planner, *, batch_size: int) -> None:
        self.planner = planner
        self.batch_size = batch_size

    def choose(self, backprop_steps: int) -> Choice:
        """The choice for K = ``backprop_steps``; see `Planner.choose`."""
        return self.planner.choose(backprop_steps, batch_sizes=[self.batch_size])

    def plan(self, backprop_steps: int) -> CheckpointPlan:
        """The plan for K = ``backprop_steps``."""
        return self.choose(backprop_steps).plan

    def fall_back(self, backprop_steps: int) -> str | None:
        """After an out-of-memory error: plan with less from now on.

        Returns:
            What changed, for the person; None when there is nothing smaller.
        """
        before = self.choose(backprop_steps)
        after = self.planner.step_down(backprop_steps, batch_size=self.batch_size)
        if after is None:
            return None
        return f"out of memory under {before.describe()}; from now on {after.describe()}"
