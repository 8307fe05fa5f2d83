"""Which provider computes self-attention: a table keyed (architecture, head width, sequence, direction).

The shipped table (``dispatch.json``) is data: one row per key, with its origin. Until a GPU has filled a row, it says
``sdpa``: PyTorch's own choice, because a kernel without a measurement has not earned the place.
"""

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastcraft_kernels.attention.providers import PROVIDERS
from fastcraft_kernels.attention.tiles import HEAD_SPLITS
from fastcraft_kernels.launch import device_facts

SHIPPED = Path(__file__).with_name("dispatch.json")
SDPA = "sdpa"
DIRECTIONS = ("forward", "backward")
BACKENDS = ("auto", SDPA, *PROVIDERS)

Row = dict[str, Any]
Key = tuple[int, int, int, str]  # architecture, head width, sequence, direction

_table: dict[Key, Row] = {}
_generation = [0]


def generation() -> int:
    """Counts changes of the table; compiled graphs read it as a guard."""
    return _generation[0]


def _key(row: Mapping[str, Any], source: str) -> Key:
    """Key of a row.

    Raises:
        ValueError: a field is missing or holds a value that has no meaning.
    """
    missing = [name for name in ("arch", "head_dim", "sequence", "direction", "provider", "origin") if name not in row]
    if missing:
        raise ValueError(f"load_attention_table: a row of {source} lacks {', '.join(missing)}: {dict(row)}")
    for name, allowed in (
        ("head_dim", tuple(HEAD_SPLITS)), ("direction", DIRECTIONS), ("provider", (SDPA, *PROVIDERS)),
    ):  # fmt: skip
        if row[name] not in allowed:
            choices = ", ".join(map(str, allowed))
            raise ValueError(f"load_attention_table: {name} in {source} must be one of {choices}, got {row[name]!r}")
    for name in ("arch", "sequence"):
        if type(row[name]) is not int or row[name] < 1:
            raise ValueError(f"load_attention_table: {name} in {source} must be a positive integer, got {row[name]!r}")
    return row["arch"], row["head_dim"], row["sequence"], row["direction"]


def _read(source: Path | str | Mapping[str, Any]) -> dict[Key, Row]:
    name = "the table" if isinstance(source, Mapping) else str(source)
    try:
        content = source if isinstance(source, Mapping) else json.loads(Path(source).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"load_attention_table: source must be a JSON file or a mapping, got {name}: {error}"
        ) from None
    rows = content.get("rows") if isinstance(content, Mapping) else None
    if not isinstance(rows, list):
        raise ValueError(f"load_attention_table: {name} must hold a list under 'rows', got {type(rows).__name__}")
    return {_key(row, name): dict(row) for row in rows}


def attention_table() -> list[Row]:
    """The rows in force, in the order of their keys."""
    if not _table:
        _table.update(_read(SHIPPED))
    return [_table[key] for key in sorted(_table)]


def load_attention_table(source: Path | str | Mapping[str, Any] | None) -> None:
    """Put rows over those in force, for this process.

    Args:
        source: what `measure_attention` wrote or returned: a JSON file or a mapping, with a list of rows under
            ``rows``, each with ``arch`` (80, 90), ``head_dim``, ``sequence``, ``direction`` (``forward``,
            ``backward``), ``provider`` and ``origin``. ``None``: back to the shipped table.

    Raises:
        ValueError: the source cannot be read, or a row makes no sense; the table stays as it was.
    """
    rows = {} if source is None else _read(source)
    if source is None:
        _table.clear()
    attention_table()
    _table.update(rows)
    _generation[0] += 1


def find_row(*, arch: int, head_dim: int, sequence: int, direction: str) -> Row | None:
    """The row of the nearest sequence (by ratio, the shorter one of two), or ``None`` for an unknown architecture."""
    rows = [
        row
        for row in attention_table()
        if (row["arch"], row["head_dim"], row["direction"]) == (arch, head_dim, direction)
    ]
    return min(rows, key=lambda row: abs(math.log2(row["sequence"] / sequence)), default=None)


@dataclass(frozen=True, kw_only=True)
class AttentionChoice:
    """Providers of both directions (`PROVIDERS`' names, or ``sdpa`` for both) and the reason in words."""

    forward: str
    backward: str
    why: str


def _same(provider: str, why: str) -> AttentionChoice:
    return AttentionChoice(forward=provider, backward=provider, why=why)


def _from_table(device: torch.device, dtype: torch.dtype, head_dim: int, sequence: int, grad: bool) -> AttentionChoice:
    if dtype not in (torch.float16, torch.bfloat16):
        return _same(SDPA, f"the table is about float16 and bfloat16, not {dtype}")
    arch = device_facts(device).arch
    names, reasons = [], []
    for direction in DIRECTIONS[: 1 + grad]:
        row = find_row(arch=arch, head_dim=head_dim, sequence=sequence, direction=direction)
        name = SDPA if row is None else row["provider"]
        reasons.append(f"{direction}: {name} ({'no row for sm' + str(arch) if row is None else row['origin']})")
        refusal = None if name == SDPA else PROVIDERS[name].refusal(device, dtype, head_dim)
        if refusal is not None:
            warnings.warn(
                f"attention: PyTorch's own choice computes this, because {refusal}", RuntimeWarning, stacklevel=2
            )
            reasons[-1] = f"{direction}: sdpa ({refusal})"
            name = SDPA
        names.append(name)
    if SDPA in names:  # PyTorch's own choice keeps what it needs for its own backward pass
        return _same(SDPA, "; ".join(reasons))
    return AttentionChoice(forward=names[0], backward=names[-1], why="; ".join(reasons))


def choose_attention(
    setting: str, backend: str, *, device: torch.device, dtype: torch.dtype, head_dim: int, sequence: int, grad: bool
) -> AttentionChoice:
    """Who computes self-attention.

    Args:
        setting: `backend.current_backend()`.
        backend: ``attention``'s argument; anything but ``"auto"`` is obeyed.
        grad: whether a backward pass will follow.

    Raises:
        ValueError: a provider that was asked for by name refuses; the message holds the reason.
    """
    if backend == "auto" and setting == "auto" and device.type == "cuda":
        return _from_table(device, dtype, head_dim, sequence, grad)
    name = backend
    if backend == "auto":
        name = "triton" if setting == "triton" else "reference"
    refusal = None if name == SDPA else PROVIDERS[name].refusal(device, dtype, head_dim)
    if refusal is not None:
        raise ValueError(f"attention: backend {name} was asked for, but {refusal}")
    asked = f"backend {backend} was asked for" if backend != "auto" else f"the process's backend is {setting}"
    return _same(name, f"{asked}, on {device.type}")
