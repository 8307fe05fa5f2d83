"""Accelerators in numbers: every constant of a prediction that is not counted from the model is in this file.

None of it has been calibrated against a card yet: sizes, rates and bandwidths are the makers' nominal figures, the
fractions of them that real kernels reach and the allowances are assumptions, and `ERROR_BANDS` says how far off a
prediction may be. What an op costs on a CPU was measured on one.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from fastcraft.errors import UserError
from fastcraft.registry import suggestion

CONTEXT_BYTES = 3 * 2**29
"""CUDA context, communication buffers, cuBLAS and cuDNN workspace: 1.5 GiB, an assumption."""
FRAGMENTATION = 0.04
"""Share of the allocated peak that the caching allocator holds beyond it, an assumption."""
LAUNCH_SECONDS = 5e-6
"""Host time of an op launched one by one, and the least that it takes on a card; an assumption."""
HOST_BYTES = 64 * 2**30
"""Host memory that each device may pin for what is offloaded, an assumption for a machine that is not there."""
SELECTIVE_SECONDS = 2.2e-5
"""Host time that every call takes besides under selective checkpointing or offloading, whose bookkeeping is Python:
measured on a CPU (benchmarks/LOG.md), the shapes UNet under ``sac:attention+conv`` against ``recompute``."""
EFFICIENCY: Mapping[str, float] = {"conv": 0.55, "linear": 0.65, "attention": 0.40, "other": 0.50, "bandwidth": 0.75}
"""Share of the nominal rate that kernels of each kind reach, an assumption."""
ERROR_BANDS = {"peak_bytes": 0.05, "seconds": 0.35}
"""Relative error to allow for until then: of the allocated peak, and of a time; assumptions too."""
CPU_FLOPS, CPU_BANDWIDTH = 1e11, 2e10
"""FLOP/s and bytes/s of one CPU core in float32: rough, only good to rank plans by."""
CPU_LAUNCH_SECONDS = 5e-5
"""What an op takes on a CPU besides its arithmetic, diffusers' modules around it included: measured in the same way, as
the part of the shapes UNet's forward and backward that does not grow with the batch."""
CALIBRATED = False
"""Whether the constants of this file have met a measurement on an accelerator."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """One device.

    ``matmul_flops`` maps a dtype's name to the dense rate of matrix products, FLOP/s; ``reserved_bytes`` and
    ``slack`` are what must stay free beyond what tensors take. ``asynchronous``: the host runs ahead, so that its time
    shows only where it is the longer one. ``host_bandwidth`` is that of copies to the host's memory and back, of which
    ``host_bytes`` may be pinned; 0 = nothing can be moved out of the way.
    """

    name: str
    memory_bytes: int
    matmul_flops: Mapping[str, float]
    bandwidth: float  # bytes/s
    reserved_bytes: int = CONTEXT_BYTES
    slack: float = FRAGMENTATION
    efficiency: Mapping[str, float] | None = None  # None = EFFICIENCY
    launch_seconds: float = LAUNCH_SECONDS
    asynchronous: bool = True
    host_bandwidth: float = 0.0  # bytes/s in each direction
    host_bytes: int = 0

    @property
    def budget_bytes(self) -> int:
        """Bytes that tensors may take at the peak."""
        return max(0, int((self.memory_bytes - self.reserved_bytes) / (1 + self.slack)))

    def share(self, kind: str) -> float:
        """Part of the nominal rate that ops of ``kind`` reach."""
        return (EFFICIENCY if self.efficiency is None else self.efficiency)[kind]


def _card(name: str, gib: float, *, bf16: float, fp32: float, bandwidth: float, host: float) -> Card:
    rates = {"bfloat16": bf16 * 1e12, "float16": bf16 * 1e12, "float32": fp32 * 1e12}
    return Card(
        name=name, memory_bytes=int(gib * 2**30), matmul_flops=rates, bandwidth=bandwidth * 1e9,
        host_bandwidth=host * 1e9, host_bytes=HOST_BYTES,
    )  # fmt: skip


CARDS = {
    card.name: card
    for card in (  # memory as drivers report it, GiB; dense TFLOP/s; GB/s; PCIe 4 or 5, 80 % of 31.5 or 63 GB/s
        _card("a100-40g", 39.4, bf16=312, fp32=19.5, bandwidth=1555, host=25),
        _card("a100-80g", 79.1, bf16=312, fp32=19.5, bandwidth=2039, host=25),
        _card("h100", 79.1, bf16=989, fp32=67, bandwidth=3350, host=50),
        _card("h200", 139.7, bf16=989, fp32=67, bandwidth=4800, host=50),
        _card("4090", 23.6, bf16=165, fp32=82.6, bandwidth=1008, host=25),
    )
}


def cpu_card(memory_bytes: int) -> Card:
    """One core of a CPU of which ``memory_bytes`` are free; a tenth of them is left alone."""
    return Card(
        name="this CPU", memory_bytes=memory_bytes, bandwidth=CPU_BANDWIDTH,
        matmul_flops=dict.fromkeys(("float32", "bfloat16", "float16"), CPU_FLOPS), reserved_bytes=0, slack=0.1,
        efficiency=dict.fromkeys(("conv", "linear", "attention", "other", "bandwidth"), 1.0),
        launch_seconds=CPU_LAUNCH_SECONDS, asynchronous=False,
    )  # fmt: skip


_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_bytes(text: str) -> int | None:
    """``"24GiB"``, ``"512 MiB"``, ``"80e9"`` or ``"1073741824"`` as bytes; None when it is no size."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        return None
    return int(float(match[1]) * _UNITS[match[2]])


def find_card(name_or_bytes: str) -> Card:
    """A card by name, or one of that many bytes for tensors with the rates of an A100.

    Raises:
        UserError: neither a known name nor a size.
    """
    name = name_or_bytes.strip().lower()
    if name in CARDS:
        return CARDS[name]
    size = parse_bytes(name)
    if not size:
        raise UserError(
            f"--device: expected a card or a size such as 24GiB, got {name_or_bytes!r}{suggestion(name, CARDS)}"
        )
    rates = CARDS["a100-80g"]
    return Card(
        name=f"{size / 2**30:.3g} GiB (rates of an A100)", memory_bytes=size, matmul_flops=rates.matmul_flops,
        bandwidth=rates.bandwidth, reserved_bytes=0, slack=0.0, host_bandwidth=rates.host_bandwidth,
        host_bytes=rates.host_bytes,
    )  # fmt: skip
