"""Selective checkpointing whose kept outputs wait in host memory.

torch's own ``CheckpointPolicy.MUST_CPU_OFFLOAD`` is acted on by graph compilers only; in eager mode it is silently a
recompute, which is why this file exists.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


def offload_contexts(matches: Callable[[Any], bool]) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The ``context_fn`` of a non-reentrant checkpoint: (for its forward, for its recompute).

    Outputs of the ops that ``matches`` picks are copied to pinned host memory during forward, on a stream of their own,
    and back from the moment the recompute begins; each op waits for its own copy only. A region goes backward once.
    """
    kept: list[tuple[Any, Any]] = []  # (op, its outputs as `_HostCopy`), in the order of the calls
    return _MoveOut(matches, kept), _BringBack(matches, kept)


class _HostCopy:
    """One tensor on its way to the host and back. ``stream`` is None for a tensor that lies there already."""

    def __init__(self, tensor: Tensor, stream: Any) -> None:
        self.stream = stream
        if stream is None:
            self.host = tensor.detach().clone()
            return
        self.host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self.device = tensor.device
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self.host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is not given away before the copy is done

    def start(self) -> None:
        """Begin the way back."""
        if self.stream is not None:
            with torch.cuda.stream(self.stream):
                self.back = self.host.to(self.device, non_blocking=True)
                self.arrived = self.stream.record_event()

    def wait(self) -> Tensor:
        """The tensor where it was, once it is there."""
        if self.stream is None:
            return self.host
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self.arrived)
        self.back.record_stream(current)
        return self.back


class _MoveOut(TorchDispatchMode):
    def __init__(self, matches: Callable[[Any], bool], kept: list[tuple[Any, Any]]) -> None:
        super().__init__()
        self.matches, self.kept = matches, kept
        self.stream: Any = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.matches(func):
            self.kept.append((func, tree_map_only(Tensor, self._copy, out)))
        return out

    def _copy(self, tensor: Tensor) -> _HostCopy:
        if tensor.is_cuda and self.stream is None:
            self.stream = torch.cuda.Stream(tensor.device)
        return _HostCopy(tensor, self.stream if tensor.is_cuda else None)


class _BringBack(TorchDispatchMode):
    def __init__(self, matches: Callable[[Any], bool], kept: list[tuple[Any, Any]]) -> None:
        super().__init__()
        self.matches, self.kept = matches, kept
        self.position = 0

    def __enter__(self) -> Any:
        for _, out in self.kept:
            tree_map_only(_HostCopy, _HostCopy.start, out)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.kept.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.matches(func):
            return func(*args, **(kwargs or {}))
        if self.position >= len(self.kept) or self.kept[self.position][0] is not func:
            raise RuntimeError(
                f"offload: {func} is not what forward called at this point; a region goes backward once, and its ops "
                "must not depend on anything that changes"
            )
        _, out = self.kept[self.position]
        self.kept[self.position] = (func, None)  # freed as soon as backward has used it
        self.position += 1
        return tree_map_only(_HostCopy, _HostCopy.wait, out)
