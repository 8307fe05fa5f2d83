"""CUDA graphs of one UNet call: recorded once for each shape, then replayed from static memory.

A replay launches a whole call at once, which pays where the CPU cannot launch kernels as fast as the GPU runs them. The
static memory of a `Slot` holds one call at a time. A step that keeps its activations for backward therefore has a slot
of its own until backward has used it; one that keeps its inputs only is replayed a second time before its backward.
Slots share no memory pool, so that they may be replayed in any order.

Everything is recorded in the thread that runs forward: backward only replays.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

MAX_SHAPES = 8
"""Kinds of calls (shapes, and what requires gradient) that are recorded; each holds memory for good."""
_WARM_UPS = 3

Key = tuple[tuple[tuple[int, ...], torch.dtype, bool], ...]
Run = Callable[[], tuple[Tensor, ...]]


class Recording(Protocol):
    """Work that can be done again. ``outputs`` lie in the same memory every time."""

    outputs: tuple[Tensor, ...]

    def replay(self) -> None:
        """Do it again, reading what lies in its inputs' memory now."""


class Recorder(Protocol):
    """Who records: `CudaRecorder`; tests bring one for the CPU."""

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Run what will be recorded, so that autotuning and lazy set-up are over."""

    def record(self, run: Run, *, after: Recording | None = None) -> Recording:
        """Record ``run``; it may use memory that ``after``, always replayed before it, has left."""


class _CudaRecording:
    def __init__(self, run: Run, device: torch.device, after: "_CudaRecording | None") -> None:
        self.graph = torch.cuda.CUDAGraph()
        pool = None if after is None else after.graph.pool()
        # thread_local: the watchdog of a process group asks for events from another thread meanwhile
        with torch.cuda.device(device), torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.outputs = run()

    def replay(self) -> None:
        self.graph.replay()


class CudaRecorder:
    """Records on a CUDA device.

    Args:
        device: where the UNet is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Run several times on a stream of its own, as recording does."""
        with torch.cuda.device(self.device):
            stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    run()
            current.wait_stream(stream)

    def record(self, run: Run, *, after: Any = None) -> Recording:
        """Record ``run`` as a graph."""
        return _CudaRecording(run, self.device, after)


class Slot:
    """Static inputs, output and, where an input requires gradient, gradients of one call.

    Args:
        call: tensors -> tensor; run while recording, never later.
        inputs: like those of every later call, in shape, dtype and requiring gradient.
        recorder: see `Recorder`.
    """

    def __init__(self, call: Callable[..., Tensor], inputs: Sequence[Tensor], *, recorder: Recorder) -> None:
        self._call = call
        self._inputs = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in inputs]
        self._wanted = [tensor for tensor in self._inputs if tensor.requires_grad]
        self._live: Tensor | None = None
        recorder.warm_up(self._warm_up)
        self._forward = recorder.record(self._run)
        self._cotangent = torch.zeros_like(self._forward.outputs[0])
        self._backward = recorder.record(self._differentiate, after=self._forward) if self._wanted else None

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """The output for other inputs; what backward needs stays in the slot."""
        with torch.no_grad():
            torch._foreach_copy_(self._inputs, list(inputs))
            self._forward.replay()
            return self._forward.outputs[0].clone()

    def backward(self, cotangent: Tensor) -> list[Tensor | None]:
        """Gradients of the inputs of the last `forward`; None for those that require none."""
        assert self._backward is not None
        self._cotangent.copy_(cotangent)
        self._backward.replay()
        grads = iter(self._backward.outputs)
        return [next(grads).clone() if tensor.requires_grad else None for tensor in self._inputs]

    def _run(self) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(bool(self._wanted)):
            self._live = self._call(*self._inputs)
        return (self._live.detach(),)

    def _differentiate(self) -> tuple[Tensor, ...]:
        live, self._live = self._live, None  # its activations go back to the pool with the graph
        return torch.autograd.grad(live, self._wanted, self._cotangent)  # type: ignore[arg-type]

    def _warm_up(self) -> None:
        (output,) = self._run()
        if self._wanted:
            self._cotangent = torch.zeros_like(output)
            self._differentiate()


class _Lease:
    """A slot until it is given back; a graph that is dropped without backward gives it back too."""

    def __init__(self, slot: Slot, free: list[Slot]) -> None:
        self.slot: Slot | None = slot
        self._free = free

    def end(self) -> None:
        if self.slot is not None:
            self._free.append(self.slot)
            self.slot = None

    __del__ = end


class GraphedCall:
    """A call that is replayed instead of run.

    Args:
        recorder: see `Recorder`.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._free: dict[Key, list[Slot]] = {}

    def takes(self, inputs: Sequence[Tensor]) -> bool:
        """Whether such calls are recorded, or still may be."""
        return _key(inputs) in self._free or len(self._free) < MAX_SHAPES

    def __call__(self, call: Callable[..., Tensor], inputs: Sequence[Tensor], *, keep: bool) -> Tensor:
        """``call(*inputs)``, differentiable once with respect to the inputs that require gradient.

        Args:
            call: a pure function of tensors, the same one every time.
            inputs: contiguous or not.
            keep: hold the activations in a slot until backward; False = hold the inputs, and replay forward once more.
        """
        inputs = [tensor if torch.is_grad_enabled() else tensor.detach() for tensor in inputs]
        key = _key(inputs)
        lease = self.lease(key)
        if lease is None:
            with torch.inference_mode(False), torch.no_grad():
                slot = Slot(call, inputs, recorder=self._recorder)
            lease = _Lease(slot, self._free.setdefault(key, []))
        if not any(tensor.requires_grad for tensor in inputs):
            assert lease.slot is not None
            output = lease.slot.forward(inputs)
            lease.end()
            return output
        return _Replayed.apply(self, key, lease, keep, *inputs)

    def lease(self, key: Key) -> _Lease | None:
        """A slot that no other call holds, or None."""
        free = self._free.get(key)
        return _Lease(free.pop(), free) if free else None


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graphs: GraphedCall, key: Key, lease: _Lease, keep: bool, *inputs: Tensor) -> Tensor:
        assert lease.slot is not None
        output = lease.slot.forward(inputs)
        ctx.graphs, ctx.key, ctx.lease = graphs, key, lease
        if not keep:
            lease.end()
            ctx.save_for_backward(*inputs)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        lease = ctx.lease
        if ctx.saved_tensors:
            lease = ctx.graphs.lease(ctx.key)
            if lease is None:
                raise RuntimeError("cuda_graphs: no graph is free for a step that is replayed in backward")
            lease.slot.forward(ctx.saved_tensors)
        if lease.slot is None:
            raise RuntimeError("cuda_graphs: a step that keeps its activations goes backward once")
        grads = lease.slot.backward(cotangent)
        lease.end()
        return None, None, None, None, *grads


def _key(inputs: Sequence[Tensor]) -> Key:
    """Without gradient mode nothing requires gradient."""
    grad = torch.is_grad_enabled()
    return tuple((tuple(tensor.shape), tensor.dtype, grad and tensor.requires_grad) for tensor in inputs)
