"""Bytes and seconds of one optimiser step, composed from phases that were each counted once.

The phases are the real code run on fake or meta tensors under `AllocationTracker`: text encoder and projections, one
denoising step without gradient, one with gradient under each treatment, decode with rewards. A step is then a sum: a
boundary between steps is one latent, so phases do not interact, and activations are linear in the batch.

Letters: B samples, K steps with gradient, T steps.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from fastcraft.memory.cards import Card
from fastcraft.memory.tracker import AllocationTracker, Op, Work
from fastcraft.records import CheckpointPlan


@dataclass(frozen=True, kw_only=True)
class Line:
    """Bytes for n samples: ``fixed + each * n``."""

    fixed: int = 0
    each: int = 0

    def at(self, samples: int) -> int:
        """Bytes for ``samples``."""
        return self.fixed + self.each * samples

    @classmethod
    def through(cls, one: int, two: int) -> Self:
        """The line through the bytes measured for one and for two samples."""
        return cls(fixed=max(0, 2 * one - two), each=two - one if two > one else one)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One phase. ``held``: bytes from its forward to its backward; ``forward_peak``: highest point of the forward above
    what was there before it; ``backward_extra``: highest point of the backward above what is held when it begins.

    ``first_held``: as ``held``, of a step whose latents carry no gradient (the first with gradient, or any step under a
    stop-gradient on its input).
    """

    held: Line
    forward_peak: Line
    backward_extra: Line = field(default_factory=Line)
    first_held: Line | None = None
    forward: Work
    backward: Work = field(default_factory=lambda: Work(ops={}))


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One optimiser step's micro-step: the allocated peak, what it consists of, and the time.

    ``at`` says in which phase the peak lies, ``bytes_by_kind`` what it consists of there; ``saved_bytes`` is what the K
    steps hold when the decode begins. ``seconds_by_phase`` are of a whole micro-step; ``flops`` too.
    """

    batch_size: int
    peak_bytes: int
    at: str
    bytes_by_kind: Mapping[str, int]
    saved_bytes: int
    seconds_by_phase: Mapping[str, float]
    flops: int

    @property
    def seconds(self) -> float:
        """Of one micro-step."""
        return sum(self.seconds_by_phase.values())

    @property
    def samples_per_sec(self) -> float:
        """Of one device."""
        return self.batch_size / self.seconds


@dataclass(frozen=True, kw_only=True)
class StepEstimate:
    """Everything that a plan is weighed by; made by `fastcraft.forecast`, kept as JSON.

    Args:
        model: for people.
        dtype: of the frozen networks.
        resolution: pixels.
        guided: two UNet rows per sample.
        static: bytes by kind that are there all the time.
        update_bytes: gradients and their flat copy, while the optimiser runs.
        text: text encoders (trained and original) and the key/value projections.
        kv_bytes: keys and values of the trained encoder, whose gradients add up during the chain's backward.
        prefix: one step without gradient.
        steps: by treatment, one step with gradient.
        heads: by the decode's treatment, decode and rewards.
    """

    model: str
    dtype: str
    resolution: int
    guided: bool
    static: Mapping[str, int]
    update_bytes: int
    text: Cost
    kv_bytes: Line
    prefix: Cost
    steps: Mapping[str, Cost]
    heads: Mapping[str, Cost]

    @property
    def attention(self) -> tuple[str, ...]:
        """Every attention op that ran in any phase."""
        return tuple(sorted(set().union(*(c.forward.attention | c.backward.attention for c in self._costs()))))

    @property
    def uncounted(self) -> tuple[str, ...]:
        """Fused ops whose FLOPs are unknown, and so are missing from every time."""
        return tuple(sorted(set().union(*(c.forward.uncounted | c.backward.uncounted for c in self._costs()))))

    def _costs(self) -> list[Cost]:
        return [self.text, self.prefix, *self.steps.values(), *self.heads.values()]

    @property
    def static_bytes(self) -> int:
        """Weights, optimiser state and buckets."""
        return sum(self.static.values())

    def predict(
        self, plan: CheckpointPlan, *, batch_size: int, num_inference_steps: int, card: Card, input_grad: bool = True
    ) -> Prediction:
        """The peak and the time of one micro-step.

        Args:
            plan: its treatments must have been estimated; the order of the steps counts.
            batch_size: B.
            num_inference_steps: T.
            card: rates; its memory does not matter here.
            input_grad: False = no step's latents carry gradient (DRTune).

        Raises:
            ValueError: a treatment that was not estimated.
        """
        unknown = sorted({*plan.steps} - self.steps.keys() | {plan.decode} - self.heads.keys())
        if unknown:
            raise ValueError(f"predict: plan must use treatments that were estimated, got {unknown}")
        held = [
            (cost.first_held if cost.first_held and (index == 0 or not input_grad) else cost.held).at(batch_size)
            for index, cost in enumerate(self.steps[name] for name in plan.steps)
        ]
        peak_bytes, at, kinds = self._peak(plan, held, batch_size)
        seconds, flops = self._time(plan, batch_size, num_inference_steps, card)
        return Prediction(
            batch_size=batch_size, peak_bytes=peak_bytes, at=at, bytes_by_kind=kinds, saved_bytes=sum(held),
            seconds_by_phase=seconds, flops=flops,
        )  # fmt: skip

    def _peak(self, plan: CheckpointPlan, held: Sequence[int], batch: int) -> tuple[int, str, dict[str, int]]:
        """The highest of all phases: bytes, where, and what of."""
        text, kv = self.text.held.at(batch), self.kv_bytes.at(batch)
        chunk = min(plan.decode_micro_batch or batch, batch)
        moments = [
            *self._fixed_moments(batch),
            ("decode and rewards", text, sum(held), self.head_bytes(plan.decode, chunk), 0),
        ]
        saved = 0
        for index, name in enumerate(plan.steps):
            cost, number = self.steps[name], f"step {index + 1} of {len(plan.steps)} ({name})"
            moments.append((f"forward of {number}", text, saved, cost.forward_peak.at(batch), 0))
            saved += held[index]
            grads = kv if index < len(plan.steps) - 1 else 0
            moments.append((f"backward of {number}", text, saved, cost.backward_extra.at(batch), grads))
        at, *amounts = max(moments, key=lambda moment: sum(moment[1:]))  # type: ignore[assignment]
        names = ("text encoder", "saved by steps", "at work", "gradients")
        kinds = {**self.static, **dict(zip(names, amounts, strict=True))}
        return sum(kinds.values()), at, kinds

    def _fixed_moments(self, batch: int) -> list[tuple[str, int, int, int, int]]:
        """Where, text activations, saved by steps, at work, gradients of the text keys: what no plan changes."""
        text = self.text.held.at(batch)
        return [
            ("text encoder", 0, 0, self.text.forward_peak.at(batch), 0),
            ("prefix", text, 0, self.prefix.forward_peak.at(batch), 0),
            ("text encoder, backward", text, 0, self.text.backward_extra.at(batch), self.kv_bytes.at(batch)),
            ("optimiser", 0, 0, self.update_bytes, 0),
        ]

    def floor_bytes(self, batch: int) -> int:
        """Bytes above the static ones that every plan takes."""
        return max(sum(moment[1:]) for moment in self._fixed_moments(batch))

    def head_bytes(self, decode: str, pictures: int) -> int:
        """Bytes of decode and rewards at their highest point, for ``pictures`` at once."""
        head = self.heads[decode]
        return max(head.forward_peak.at(pictures), head.held.at(pictures) + head.backward_extra.at(pictures))

    def _time(self, plan: CheckpointPlan, batch: int, total: int, card: Card) -> tuple[dict[str, float], int]:
        """Seconds by phase and FLOPs of one micro-step."""
        chunk = min(plan.decode_micro_batch or batch, batch)
        chunks, frozen_steps, head = math.ceil(batch / chunk), total - len(plan.steps), self.heads[plan.decode]

        def seconds(cost: Cost, samples: int) -> float:
            return sum(work_seconds(work, card, dtype=self.dtype, samples=samples) for work in _works(cost))

        phases = {
            "text encoder": seconds(self.text, batch),
            "prefix": frozen_steps * seconds(self.prefix, batch),
            "steps with gradient": sum(
                plan.steps.count(name) * seconds(self.steps[name], batch) for name in set(plan.steps)
            ),
            "decode and rewards": chunks * seconds(head, chunk),
        }
        costs = [self.text, *([self.prefix] * frozen_steps), *(self.steps[name] for name in plan.steps), head]
        return phases, batch * sum(work.flops for cost in costs for work in _works(cost))

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` gives it back."""
        rows = asdict(self)
        for cost in (rows["text"], rows["prefix"], *rows["steps"].values(), *rows["heads"].values()):
            for name in ("forward", "backward"):
                work = cost[name]
                work["ops"] = [[*op, count] for op, count in work["ops"].items()]
                work["attention"], work["uncounted"] = sorted(work["attention"]), sorted(work["uncounted"])
        return rows

    @classmethod
    def from_json(cls, rows: Mapping[str, Any]) -> Self:
        """From what `to_json` gave."""

        def work(row: Mapping[str, Any]) -> Work:
            ops = {Op(*op): count for *op, count in row["ops"]}
            return Work(ops=ops, attention=frozenset(row["attention"]), uncounted=frozenset(row["uncounted"]))

        def cost(row: Mapping[str, Any]) -> Cost:
            lines = {name: Line(**row[name]) for name in ("held", "forward_peak", "backward_extra")}
            first = None if row["first_held"] is None else Line(**row["first_held"])
            return Cost(**lines, first_held=first, forward=work(row["forward"]), backward=work(row["backward"]))

        costs: dict[str, Any] = {name: cost(rows[name]) for name in ("text", "prefix")}
        for group in ("steps", "heads"):
            costs[group] = {name: cost(row) for name, row in rows[group].items()}
        return cls(**{**rows, **costs, "kv_bytes": Line(**rows["kv_bytes"])})


def _works(cost: Cost) -> tuple[Work, Work]:
    return cost.forward, cost.backward


def work_seconds(work: Work, card: Card, *, dtype: str, samples: int) -> float:
    """Roofline time: every op takes its products, its traffic or its launch, whichever is longest."""
    rate, bandwidth = card.matmul_flops[dtype], card.bandwidth * card.share("bandwidth")
    total = 0.0
    for op, count in work.ops.items():
        product = op.flops * samples / (rate * card.share(op.kind))
        traffic = (op.moved_bytes * samples + op.weight_bytes) / bandwidth
        total += count * max(product, traffic, card.launch_seconds)
    return total


def static_bytes(
    *, frozen: Mapping[str, int], num_trained: int, world_size: int = 1, max_bucket: int
) -> tuple[dict[str, int], int]:
    """(bytes by kind that stay, bytes while the optimiser runs) under ZeRO-2 with float32 parameters.

    Args:
        frozen: bytes by kind of what is not trained, and of untrained parts of the trained module.
        num_trained: trained parameters.
        world_size: ranks that share masters, moments and gradients.
        max_bucket: elements of the largest reduction bucket.
    """
    shard = math.ceil(4 * num_trained / world_size)
    kinds = {
        **frozen,
        "trained weights": 4 * num_trained,
        "masters and moments": 3 * shard,
        "gradient bucket": 4 * min(num_trained, max_bucket),
    }
    return kinds, 2 * shard


def measure(
    run: Callable[[int], tuple[Tensor, ...]], *, weights: Iterable[Tensor], backward: bool = True
) -> Cost:
    """Cost of a phase that is a function of the number of samples, taken at one and two samples.

    Args:
        run: what the phase leaves behind; its sum is back-propagated.
        weights: what is there before.
        backward: whether it has one.
    """
    one, two = (_measure_once(lambda n=n: run(n), weights=weights, backward=backward) for n in (1, 2))  # type: ignore[misc]
    lines = [Line.through(a, b) for a, b in zip(one[:3], two[:3], strict=True)]
    return Cost(held=lines[0], forward_peak=lines[1], backward_extra=lines[2], forward=one[3], backward=one[4])


def measure_step(
    step: Callable[[Tensor], Tensor], latents: Tensor, *, weights: Iterable[Tensor], backward: bool = True
) -> Cost:
    """Cost of one denoising step on one sample; everything in it is proportional to the batch.

    Args:
        step: latents in, latents out.
        latents: ``(1, C, h, w)``.
        weights: what is there before, the text keys included.
        backward: False for a step without gradient.
    """
    weights = [*weights, latents]
    start = latents.detach().requires_grad_(backward)
    held, forward_peak, extra, forward, work = _measure_once(
        lambda: (step(start),), weights=weights, backward=backward
    )
    first = None
    if backward:
        first = Line(each=_measure_once(lambda: (step(latents),), weights=weights, backward=False)[0])
    return Cost(
        held=Line(each=held), forward_peak=Line(each=forward_peak), backward_extra=Line(each=extra), first_held=first,
        forward=forward, backward=work,
    )  # fmt: skip


def _measure_once(
    run: Callable[[], tuple[Tensor, ...]], *, weights: Iterable[Tensor], backward: bool
) -> tuple[int, int, int, Work, Work]:
    """(held, forward peak, backward extra, forward work, backward work)."""
    with AllocationTracker(weights) as tracker:
        outputs = run()
        held, forward_peak, forward = tracker.live, tracker.peak, tracker.work()
        if not backward:
            return held, forward_peak, 0, forward, Work(ops={})
        tracker.restart()
        roots = [output for output in outputs if output.requires_grad]
        torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
        return held, forward_peak, tracker.peak - held, forward, tracker.work()
