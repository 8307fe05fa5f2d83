"""What a piece of code allocates and computes: live and peak bytes, FLOPs and traffic, seen op by op.

Works the same on real, fake and meta tensors, so a prediction and a measurement count by one rule.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_CONV = {"convolution", "convolution_backward", "_convolution", "frozen_conv2d"}
_ATTENTION = ("attention", "sdpa")


class Op(NamedTuple):
    """One kind of work: ``kind`` is conv, linear, attention or other; FLOPs and bytes are those of one call.

    ``moved_bytes`` are inputs and outputs that grow with the batch, ``weight_bytes`` those that do not.
    """

    kind: str
    flops: int
    moved_bytes: int
    weight_bytes: int


@dataclass(frozen=True, kw_only=True)
class Work:
    """Ops of a phase with their number of calls, and what was noticed on the way.

    ``attention`` names every attention op that ran; ``uncounted`` the fastcraft ops without a FLOP formula.
    """

    ops: Mapping[Op, int]
    attention: frozenset[str] = frozenset()
    uncounted: frozenset[str] = frozenset()

    @property
    def flops(self) -> int:
        """A multiply-add counts as two."""
        return sum(op.flops * count for op, count in self.ops.items())


class AllocationTracker(TorchDispatchMode):
    """Counts storages from the op that makes them to their end.

    Args:
        weights: tensors that are there before and are not counted, for example parameters.

    Views and in-place results are no allocation. Sizes are exact; CUDA's allocator rounds each up to 512 bytes.
    """

    def __init__(self, weights: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._weights = {tensor.untyped_storage()._cdata: tensor for tensor in weights}  # held: an id is reused
        self._alive: dict[int, Any] = {}
        self._calls: Counter[Op] = Counter()
        self._attention: set[str] = set()
        self._uncounted: set[str] = set()

    def restart(self) -> None:
        """Forget the work so far; the peak begins again at what is live."""
        self.peak = self.live
        self._calls, self._attention, self._uncounted = Counter(), set(), set()

    def work(self) -> Work:
        """What ran since the last `restart`."""
        return Work(
            ops=dict(self._calls), attention=frozenset(self._attention), uncounted=frozenset(self._uncounted)
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in flop_registry and func.namespace == "aten":
            with self:  # inference mode shows composite ops whole
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        returns = func._schema.returns
        aliases = returns and all(item.alias_info is not None for item in returns)
        if not aliases:
            outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            for tensor in outputs:
                self._add(tensor)
            self._count(func, args, kwargs, result, outputs)
        elif returns[0].alias_info.is_write:
            self._count(func, args, kwargs, result, [])
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not size or key in self._alive or key in self._weights:
            return

        def gone(_: Any) -> None:
            if self._alive.pop(key, None) is not None:
                self.live -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any, outputs: list[Tensor]) -> None:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        weight_bytes = sum(_nbytes(leaf) for leaf in inputs if leaf.untyped_storage()._cdata in self._weights)
        moved_bytes = sum(_nbytes(leaf) for leaf in (*inputs, *outputs)) - weight_bytes
        name = func._overloadpacket.__name__
        kind, flops = "other", 0
        if any(word in name for word in _ATTENTION):
            kind = "attention"
            self._attention.add(f"{func.namespace}.{name}")
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            flops = int(formula(*args, **kwargs, out_val=result))
        elif name.startswith("_scaled_dot_product"):
            flops = _attention_flops(inputs, backward=name.endswith("backward"))
        elif func.namespace == "fastcraft":
            self._uncounted.add(f"fastcraft.{name}")
        if flops and kind == "other":
            kind = "conv" if name in _CONV else "linear"
        self._calls[Op(kind, flops, moved_bytes, weight_bytes)] += 1


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _attention_flops(inputs: list[Tensor], *, backward: bool) -> int:
    """Two products forward, five backward, as PyTorch counts those of its other attention ops."""
    query, key, value = inputs[1:4] if backward else inputs[:3]
    batch, heads, length, width = query.shape
    both = width + value.shape[-1]
    per_product = batch * heads * length * key.shape[-2]
    return per_product * (2 * both + 2 * both + 2 * width) if backward else per_product * 2 * both


def bytes_of(*modules: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage once."""
    storages = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    return sum(storages.values())
