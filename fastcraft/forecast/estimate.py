"""Bytes and seconds of one optimiser step, composed from phases that were each counted once.

The phases are the real code run on fake or meta tensors under `AllocationTracker`: text encoder and projections, one
denoising step without gradient, one with gradient under each treatment, decode with rewards. A step is then a sum: a
boundary between steps is one latent, so phases do not interact, and activations are linear in the batch.

Letters: B samples, K steps with gradient, T steps.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from fastcraft.forecast.cards import Card
from fastcraft.forecast.cost import Cost, Line, work_seconds
from fastcraft.forecast.tracker import Op, Work
from fastcraft.memory.plan import KEEP, RECOMPUTE, CheckpointPlan

Region = tuple[str, Cost]
"""A stretch of the chain that backward goes through at once, one step or a segment, and its name for people."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One optimiser step's micro-step: the allocated peak, what it consists of, and the time.

    ``at`` says in which phase the peak lies, ``bytes_by_kind`` what it consists of there; ``saved_bytes`` is what the K
    steps hold when the decode begins, ``host_bytes`` what they have in the host's memory then (without what its
    allocator rounds up). ``seconds_by_phase`` are of a whole micro-step; ``flops`` too.
    """

    batch_size: int
    peak_bytes: int
    at: str
    bytes_by_kind: Mapping[str, int]
    saved_bytes: int
    host_bytes: int
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
        weight_gradient_bytes: gradients of a trained UNet, which all steps add to during the chain's backward.
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
    weight_gradient_bytes: int = 0

    @property
    def attention(self) -> tuple[str, ...]:
        """Every attention op of denoising, decode and rewards."""
        costs = (self.prefix, *self.steps.values(), *self.heads.values())
        return tuple(sorted(set().union(*(work.attention for cost in costs for work in cost.works))))

    @property
    def uncounted(self) -> tuple[str, ...]:
        """Fused ops whose FLOPs are unknown, and so are missing from every time."""
        costs = (self.text, self.prefix, *self.steps.values(), *self.heads.values())
        return tuple(sorted(set().union(*(work.uncounted for cost in costs for work in cost.works))))

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
        if unknown or (plan.segments and {*plan.steps} != {KEEP}):
            raise ValueError(f"predict: plan must use treatments that were estimated, got {unknown or plan}")
        regions = self.regions(plan)
        saved = self._saved(regions, batch_size, input_grad)
        peak_bytes, at, kinds = self._peak(plan, regions, saved, batch_size)
        seconds, flops = self._time(plan, regions, batch_size, num_inference_steps - len(plan.steps), card)
        return Prediction(
            batch_size=batch_size, peak_bytes=peak_bytes, at=at, bytes_by_kind=kinds,
            saved_bytes=sum(held for held, _ in saved), host_bytes=self.host_bytes(plan, batch_size),
            seconds_by_phase=seconds, flops=flops,
        )  # fmt: skip

    def regions(self, plan: CheckpointPlan) -> list[Region]:
        """What backward goes through at once, in the order of the chain; treatments must have been estimated."""
        if plan.segments:
            return [(f"segment:{length}", self._segment(length)) for length in plan.segments]
        if plan.batched:
            full, rest = divmod(len(plan.steps), plan.batched)
            lengths = [rest] * bool(rest) + [plan.batched] * full
            return [(f"batch:{length}", self._batch(length)) for length in lengths]
        return [(name, self.steps[name]) for name in plan.steps]

    def _batch(self, length: int) -> Cost:
        """``length`` steps whose backward is one call at so many times the batch; what starts it costs once."""
        again = self.steps[RECOMPUTE]
        held = (again.first_held or again.held).each
        extra = (again.first_extra or again.backward_extra).each
        repeated_keys = self.kv_bytes.each if length > 1 else 0

        def at_once(op: Op) -> Op:
            return op._replace(flops=op.flops * length, moved_bytes=op.moved_bytes * length)

        return Cost(
            held=Line(each=held * length),
            forward_peak=Line(each=again.forward_peak.each + held * (length - 1)),
            backward_extra=Line(each=(extra + repeated_keys) * length),
            forward=replace(again.forward, ops={op: count * length for op, count in again.forward.ops.items()}),
            backward=replace(again.backward, ops={at_once(op): count for op, count in again.backward.ops.items()}),
        )

    def _saved(self, regions: Sequence[Region], batch: int, input_grad: bool) -> list[tuple[int, int]]:
        """(held, backward extra) of each region."""
        return [cost.step_bytes(batch, first=index == 0 or not input_grad) for index, (_, cost) in enumerate(regions)]

    def chain_bytes(self, plan: CheckpointPlan, *, batch_size: int, input_grad: bool) -> tuple[int, int]:
        """(bytes above the static ones at the highest point outside the decode, bytes saved by all steps)."""
        regions = self.regions(plan)
        saved = self._saved(regions, batch_size, input_grad)
        highest = max(sum(moment[1:]) for moment in self._chain_moments(regions, saved, batch_size))
        return highest, sum(held for held, _ in saved)

    def host_bytes(self, plan: CheckpointPlan, batch: int) -> int:
        """Bytes that the steps have in the host's memory when the decode begins."""
        return sum(cost.host.at(batch) for _, cost in self.regions(plan))

    def _segment(self, length: int) -> Cost:
        """``length`` steps that keep everything, run again together: in backward all of them are held at once."""
        keep, again = self.steps[KEEP], self.steps[RECOMPUTE]

        def longer(line: Line | None) -> Line:
            return Line(each=(line or again.backward_extra).each + (length - 1) * keep.held.each)

        def times(work: Work) -> Work:
            return replace(work, ops={op: count * length for op, count in work.ops.items()})

        return replace(
            again, backward_extra=longer(again.backward_extra), first_extra=longer(again.first_extra),
            forward=times(again.forward), backward=times(again.backward),
        )  # fmt: skip

    def _peak(
        self, plan: CheckpointPlan, regions: Sequence[Region], saved: Sequence[tuple[int, int]], batch: int
    ) -> tuple[int, str, dict[str, int]]:
        """The highest of all phases: bytes, where, and what of; ``saved`` are (held, backward extra) of each region."""
        chunk, all_saved = min(plan.decode_micro_batch or batch, batch), sum(held for held, _ in saved)
        moments = self._chain_moments(regions, saved, batch)
        moments.append(
            ("decode and rewards", self.text.held.at(batch), all_saved, self.head_bytes(plan.decode, chunk), 0)
        )
        at, *amounts = max(moments, key=lambda moment: sum(moment[1:]))
        names = ("text encoder", "saved by steps", "at work", "gradients")
        kinds = {**self.static, **dict(zip(names, amounts, strict=True))}
        return sum(kinds.values()), at, kinds

    def _chain_moments(
        self, regions: Sequence[Region], saved: Sequence[tuple[int, int]], batch: int
    ) -> list[tuple[str, int, int, int, int]]:
        """All moments but the decode's, as `_fixed_moments`."""
        text, kv, moments = self.text.held.at(batch), self.kv_bytes.at(batch), self._fixed_moments(batch)
        before = 0
        for index, ((name, cost), (held, extra)) in enumerate(zip(regions, saved, strict=True)):
            number = f"step {index + 1} of {len(regions)} ({name})"
            grads = self.weight_gradient_bytes + (kv if index < len(regions) - 1 else 0)
            moments.append((f"forward of {number}", text, before, cost.forward_peak.at(batch), 0))
            moments.append((f"backward of {number}", text, before + held, extra, grads))
            before += held
        return moments

    def _fixed_moments(self, batch: int) -> list[tuple[str, int, int, int, int]]:
        """Where, text activations, saved by steps, at work, gradients of the text keys: what no plan changes."""
        text, kv = self.text.held.at(batch), self.kv_bytes.at(batch)
        return [
            ("text encoder", 0, 0, self.text.forward_peak.at(batch), 0),
            ("prefix", text, 0, self.prefix.forward_peak.at(batch) + kv, 0),  # it has text keys of its own
            ("text encoder, backward", text, 0, self.text.backward_extra.at(batch), kv),
            ("optimiser", 0, 0, self.update_bytes, 0),
        ]

    def floor_bytes(self, batch: int) -> int:
        """Bytes above the static ones that every plan takes."""
        return max(sum(moment[1:]) for moment in self._fixed_moments(batch))

    def head_bytes(self, decode: str, pictures: int) -> int:
        """Bytes of decode and rewards at their highest point, for ``pictures`` at once."""
        head = self.heads[decode]
        return max(head.forward_peak.at(pictures), head.held.at(pictures) + head.backward_extra.at(pictures))

    def _time(
        self, plan: CheckpointPlan, regions: Sequence[Region], batch: int, prefix_steps: int, card: Card
    ) -> tuple[dict[str, float], int]:
        """Seconds by phase and FLOPs of one micro-step."""
        chunk, head = min(plan.decode_micro_batch or batch, batch), self.heads[plan.decode]

        def seconds(cost: Cost, samples: int) -> float:
            return sum(work_seconds(work, card, dtype=self.dtype, samples=samples) for work in cost.works)

        once = {name: seconds(cost, batch) for name, cost in dict(regions).items()}
        phases = {
            "text encoder": seconds(self.text, batch),
            "prefix": prefix_steps * seconds(self.prefix, batch),
            "steps with gradient": sum(once[name] for name, _ in regions),
            "decode and rewards": math.ceil(batch / chunk) * seconds(head, chunk),
        }
        flops = sum(cost.flops for cost in (self.text, head, *(cost for _, cost in regions)))
        return phases, batch * (flops + prefix_steps * self.prefix.flops)

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` gives it back."""
        rows = asdict(self)
        for cost in (rows["text"], rows["prefix"], *rows["steps"].values(), *rows["heads"].values()):
            for name in ("forward", "again", "backward"):
                work = cost[name]
                work["ops"] = [[*op, count] for op, count in work["ops"].items()]
                work["attention"], work["uncounted"] = sorted(work["attention"]), sorted(work["uncounted"])
        return rows

    @classmethod
    def from_json(cls, rows: Mapping[str, Any]) -> Self:
        """From what `to_json` gave."""

        def work(row: Mapping[str, Any]) -> Work:
            ops = {Op(*op): count for *op, count in row["ops"]}
            names = {name: frozenset(row[name]) for name in ("attention", "uncounted")}
            return Work(**{**row, **names, "ops": ops})

        def cost(row: Mapping[str, Any]) -> Cost:
            lines: dict[str, Any] = {
                name: Line(**row[name]) for name in ("held", "forward_peak", "backward_extra", "host")
            }
            for name in ("first_held", "first_extra"):
                lines[name] = None if row[name] is None else Line(**row[name])
            works: dict[str, Any] = {name: work(row[name]) for name in ("forward", "again", "backward")}
            return Cost(**lines, **works)

        costs: dict[str, Any] = {name: cost(rows[name]) for name in ("text", "prefix")}
        for group in ("steps", "heads"):
            costs[group] = {name: cost(row) for name, row in rows[group].items()}
        return cls(**{**rows, **costs, "kv_bytes": Line(**rows["kv_bytes"])})
