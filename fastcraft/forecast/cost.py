"""What one phase of a step costs, counted on tensors without contents: bytes, FLOPs, traffic and seconds."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from fastcraft.forecast.cards import SELECTIVE_SECONDS, Card
from fastcraft.forecast.tracker import AllocationTracker, Work


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

    ``first_held`` and ``first_extra``: the same of a step whose latents carry no gradient (the first with gradient, or
    any step under a stop-gradient on its input). ``host``: bytes in the host's memory from forward to backward;
    ``again``: the work of a recompute that waits for them, which otherwise is part of ``backward``.
    """

    held: Line
    forward_peak: Line
    backward_extra: Line = field(default_factory=Line)
    first_held: Line | None = None
    first_extra: Line | None = None
    host: Line = field(default_factory=Line)
    forward: Work
    again: Work = field(default_factory=lambda: Work(ops={}))
    backward: Work = field(default_factory=lambda: Work(ops={}))

    @property
    def works(self) -> tuple[Work, Work, Work]:
        """Forward, recompute beside copies, backward: one after the other."""
        return self.forward, self.again, self.backward

    @property
    def flops(self) -> int:
        """Of all of it, for one sample."""
        return sum(work.flops for work in self.works)

    def step_bytes(self, samples: int, *, first: bool) -> tuple[int, int]:
        """(held, backward extra) of a denoising step."""
        held = self.first_held if first and self.first_held else self.held
        extra = self.first_extra if first and self.first_extra else self.backward_extra
        return held.at(samples), extra.at(samples)


def work_seconds(work: Work, card: Card, *, dtype: str, samples: int) -> float:
    """Roofline time: every op takes its products, its traffic or its launch, whichever is longest.

    The host's time, launches and the bookkeeping of selective checkpointing, is hidden behind that of a card as far as
    it is shorter; on a CPU it comes on top. Copies to the host and back run beside the ops.
    """
    rate, bandwidth = card.matmul_flops[dtype], card.bandwidth * card.share("bandwidth")
    least = card.launch_seconds if card.asynchronous else 0.0
    host, device = work.num_selected * SELECTIVE_SECONDS, 0.0
    for op, count in work.ops.items():
        product = op.flops * samples / (rate * card.share(op.kind))
        traffic = (op.moved_bytes * samples + op.weight_bytes) / bandwidth
        device += count * max(product, traffic, least)
        host += count * card.launch_seconds
    copies = work.copied_bytes * samples / card.host_bandwidth if work.copied_bytes else 0.0
    return max(device, host, copies) if card.asynchronous else device + host


@dataclass(frozen=True, kw_only=True)
class TrainedBytes:
    """Trained parameters of one part: how many, bytes of each, and of how many an average is kept."""

    num_parameters: int
    itemsize: int = 4
    num_averaged: int = 0


def static_bytes(
    *, frozen: Mapping[str, int], trained: Mapping[str, TrainedBytes], world_size: int = 1, max_bucket: int
) -> tuple[dict[str, int], int]:
    """(bytes by kind that stay, bytes while the optimiser runs) under ZeRO-2.

    Every rank has the weights; masters, moments and averages are float32 and shared. While the optimiser runs, so are
    the gradients: float32 ones twice, for DeepSpeed flattens them once more; those of bfloat16 weights once.

    Args:
        frozen: bytes by kind of what is not trained, and of untrained parts of the trained module.
        trained: by part.
        world_size: ranks that share.
        max_bucket: elements of the largest reduction bucket.
    """
    total = sum(part.num_parameters for part in trained.values())
    itemsize = max((part.itemsize for part in trained.values()), default=4)
    shard = math.ceil(4 * total / world_size)
    averages = math.ceil(4 * sum(part.num_averaged for part in trained.values()) / world_size)
    kinds = {
        **frozen,
        **{f"trained weights, {name}": part.itemsize * part.num_parameters for name, part in trained.items()},
        "masters and moments": 3 * shard,
        **({"averages": averages} if averages else {}),
        "gradient bucket": itemsize * min(total, max_bucket),
    }
    return kinds, (2 if itemsize == 4 else 1) * shard


def measure(run: Callable[[int], tuple[Tensor, ...]], *, weights: Iterable[Tensor], backward: bool = True) -> Cost:
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
    held, forward_peak, extra, forward, work = _measure_once(lambda: (step(start),), weights=weights, backward=backward)
    first: dict[str, Any] = {}
    if backward:
        row = _measure_once(lambda: (step(latents),), weights=weights, backward=True)
        first = {"first_held": Line(each=row[0]), "first_extra": Line(each=row[2])}
    return Cost(
        held=Line(each=held), forward_peak=Line(each=forward_peak), backward_extra=Line(each=extra), **first,
        forward=forward, backward=work,
    )  # fmt: skip


def offloaded(kept: Cost, *, again: Cost, keep: Cost) -> Cost:
    """A step under ``offload:OPS``, from what it costs under ``sac:OPS``, ``recompute`` and ``keep``.

    What sac keeps goes to the host during forward and comes back, all of it, when the step is run again; backward
    proper begins when both are done. In forward the device is counted as if it held it all until the end: a copy may
    lag behind, and the memory waits for it.
    """

    def back(held: Line, extra: Line, bare: Line) -> Line:
        return Line(each=extra.each + held.each - bare.each)

    host = Line(each=kept.held.each - again.held.each)
    first = None
    if kept.first_held and kept.first_extra and again.first_held:
        first = back(kept.first_held, kept.first_extra, again.first_held)
    recomputed = Counter(kept.backward.ops) - Counter(keep.backward.ops)
    return Cost(
        held=again.held, first_held=again.first_held, forward_peak=kept.forward_peak, host=host,
        backward_extra=back(kept.held, kept.backward_extra, again.held), first_extra=first,
        forward=replace(kept.forward, copied_bytes=host.each),
        again=replace(kept.backward, ops=dict(recomputed), copied_bytes=host.each), backward=keep.backward,
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
        if roots:
            torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
        return held, forward_peak, tracker.peak - held, forward, tracker.work()


def parameter_counts(*modules: Any) -> tuple[int, int]:
    """(trainable, frozen) parameters of ``modules``."""
    trainable = frozen = 0
    for module in modules:
        for parameter in module.parameters():
            if parameter.requires_grad:
                trainable += parameter.numel()
            else:
                frozen += parameter.numel()
    return trainable, frozen
