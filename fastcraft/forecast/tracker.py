"""What a piece of code allocates and computes: live and peak bytes, FLOPs and traffic, seen op by op.

Works the same on real, fake and meta tensors, so a prediction and a measurement count by one rule.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_CONV = {"convolution", "convolution_backward", "_convolution", "frozen_conv2d"}
_PRODUCTS = (
    "attention",
    "conv",
    "linear",
)  # in the name of a fused op that multiplies matrices; others only move bytes
_COMPOSITE = "scaled_dot_product_attention"  # seen in inference mode only; what it becomes there has no name here


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

    ``attention`` names every attention op that ran; ``uncounted`` the fused ops that multiply matrices
    and have no FLOP formula. ``num_calls`` are all that went through the dispatcher, views too; ``num_selected`` those
    of them that selective checkpointing looked at. ``copied_bytes`` cross to the host or back meanwhile, for one
    sample.
    """

    ops: Mapping[Op, int]
    num_calls: int = 0
    num_selected: int = 0
    copied_bytes: int = 0
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
        self._num_calls = 0
        self._attention: set[str] = set()
        self._uncounted: set[str] = set()

    def restart(self) -> None:
        """Forget the work so far; the peak begins again at what is live."""
        self.peak = self.live
        self._calls, self._num_calls, self._attention, self._uncounted = Counter(), 0, set(), set()

    def work(self) -> Work:
        """What ran since the last `restart`."""
        return Work(
            ops=dict(self._calls), num_calls=self._num_calls, attention=frozenset(self._attention),
            uncounted=frozenset(self._uncounted),
        )  # fmt: skip

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        traits = _traits(func)
        if traits.composite:
            with self:  # inference mode shows composite ops whole
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        if func.namespace == "prim":  # a question to a fake tensor, such as where it lies
            return result
        self._num_calls += 1
        if traits.view:
            return result
        outputs = [] if traits.in_place else _tensors((result,))
        for tensor in outputs:
            self._add(tensor)
        if not traits.allocates_only:
            self._count(traits, args, kwargs, result, outputs)
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

    def _count(self, traits: "_Traits", args: Any, kwargs: Any, result: Any, outputs: list[Tensor]) -> None:
        inputs = _tensors((*args, *kwargs.values()))
        weight_bytes = sum(_nbytes(leaf) for leaf in inputs if leaf.untyped_storage()._cdata in self._weights)
        moved_bytes = sum(map(_nbytes, inputs)) + sum(map(_nbytes, outputs)) - weight_bytes
        kind, flops = traits.kind, 0
        if traits.formula is not None:
            flops = int(traits.formula(*args, **kwargs, out_val=result))
        elif traits.attends:
            flops = _attention_flops(inputs, backward=traits.name.endswith("backward"))
        elif traits.name.startswith("fastcraft.") and any(word in traits.name for word in _PRODUCTS):
            self._uncounted.add(traits.name)
        if kind == "attention" and not traits.name.endswith("." + _COMPOSITE):
            self._attention.add(traits.name)
        self._calls[Op(kind, flops, moved_bytes, weight_bytes)] += 1


@dataclass(frozen=True, kw_only=True, slots=True)
class _Traits:
    """What is known of an op without its arguments."""

    name: str  # "aten.addmm"
    kind: str
    composite: bool  # to be taken apart
    view: bool
    in_place: bool
    allocates_only: bool  # nothing is read or written
    attends: bool  # an attention op for which PyTorch has no FLOP formula
    formula: Any


@functools.cache
def _traits(func: Any) -> _Traits:
    packet, schema, name = func._overloadpacket, func._schema, func._overloadpacket.__name__
    formula = flop_registry.get(packet)
    aliases = [item.alias_info for item in schema.returns]
    aliased = bool(aliases) and all(alias is not None for alias in aliases)
    written = aliased and aliases[0].is_write
    composite = func.namespace == "aten" and name != _COMPOSITE and formula is None
    if composite:
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    kind = "attention" if "attention" in name else "other"
    if formula is not None and kind == "other":
        kind = "conv" if name in _CONV else "linear"
    return _Traits(
        name=f"{func.namespace}.{name}",
        kind=kind,
        composite=composite,
        view=(aliased and not written) or name == "_unsafe_view",  # its schema tells of no alias, but it is one
        in_place=written,
        allocates_only=name.removeprefix("new_").startswith("empty"),
        attends=formula is None and "scaled_dot_product" in name,
        formula=formula,
    )


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Tensors among ``values`` and inside their lists and tuples."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


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
