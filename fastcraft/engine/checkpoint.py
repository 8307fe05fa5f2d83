"""Checkpoints: consolidated, independent of the world size, safetensors and JSON only, checksummed, renamed into place.

``checkpoints/step-000100/`` holds ``model.safetensors`` and ``optimizer.safetensors`` (float32, the whole model),
``rank-0000.safetensors`` and so on (random states), ``state.json`` and ``manifest.json`` (sizes and SHA-256 of the
others). It is written beside as ``.step-000100.tmp`` and renamed by rank 0, so a process killed at any moment leaves
every finished checkpoint whole. Nothing that can hold code is ever read.
"""

import json
import logging
import random
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastcraft.durable import flush, put_in_place, recover, sha256, write_json, write_tensors
from fastcraft.engine import old_runs
from fastcraft.engine.agreement import agree, rank, world_size
from fastcraft.errors import UserError

FORMAT = 2
"""Version of the layout. Format 1 is read too (`fastcraft.engine.old_runs`), any other is refused."""

_NAME = re.compile(r"step-(\d{6,})")
_TEMPORARY = re.compile(r"\.step-\d{6,}\.tmp")
_RETIRED = re.compile(r"\.(step-\d{6,})\.old")

logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A save failed (disk full, say); older checkpoints are untouched and training may go on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What `load_checkpoint` read.

    ``tensors`` are the model's and the optimiser's, ``rank_tensors`` this rank's own ones or None when the checkpoint
    was written at another world size, ``state`` is the JSON given to `save_checkpoint`.
    """

    step: int
    world_size: int
    tensors: dict[str, Tensor]
    rank_tensors: dict[str, Tensor] | None
    state: dict[str, Any]


def save_checkpoint(
    directory: Path,
    step: int,
    *,
    tensors: Mapping[str, Tensor],
    rank_tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write ``directory/step-NNNNNN``; every rank calls it, all return after it is in place.

    Args:
        directory: on a file system that all ranks see.
        step: optimiser steps done. Saving a step again replaces the old folder only once the new one is complete.
        tensors: contiguous CPU tensors, used on rank 0; names that begin with ``param.`` go to ``model.safetensors``.
        rank_tensors: this rank's own, see `rng_tensors`.
        state: JSON values, used on rank 0; finite numbers only.
        keep: newest checkpoints up to ``step`` that stay; the others go only after this one is in place.

    Raises:
        CheckpointError: on every rank when any rank could not write; what was there before is still there.
    """
    final = directory / f"step-{step:06d}"
    temporary = directory / f".{final.name}.tmp"
    rank_file = temporary / f"rank-{rank():04d}.safetensors"

    def publish() -> None:
        model = {name: tensor for name, tensor in tensors.items() if name.startswith("param.")}
        write_tensors(temporary / "model.safetensors", model)
        rest = {name: tensor for name, tensor in tensors.items() if name not in model}
        write_tensors(temporary / "optimizer.safetensors", rest)
        write_json(temporary / "state.json", dict(state))
        _write_manifest(temporary, step, world_size())
        put_in_place(temporary, final)
        _prune(directory, step, keep)

    try:
        _together(rank() == 0, lambda: _make_empty(temporary), step)
        _together(True, lambda: write_tensors(rank_file, rank_tensors), step)
        _together(rank() == 0, publish, step)
    except CheckpointError:
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def sweep_checkpoints(directory: Path) -> None:
    """Clear what killed saves left behind. Rank 0 calls it when a run starts, before `find_checkpoint`."""
    for path in sorted(directory.glob(".step-*")):
        if retired := _RETIRED.fullmatch(path.name):
            recover(directory / retired[1])
        elif _TEMPORARY.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def find_checkpoint(directory: Path) -> tuple[Path, list[tuple[Path, str]]]:
    """The newest checkpoint whose manifest holds, and the newer ones that were skipped with the reason of each.

    Raises:
        UserError: none holds; never a silent fresh start.
    """
    skipped: list[tuple[Path, str]] = []
    for path in _newest_first(directory):
        try:
            _verify(path)
        except ValueError as error:
            skipped.append((path, str(error)))
        else:
            return path, skipped
    reasons = "; ".join(f"{path.name}: {reason}" for path, reason in skipped) or "there is none"
    raise UserError(f"--resume: no usable checkpoint in {str(directory)!r}: {reasons}")


def load_checkpoint(path: Path, *, rank: int, world_size: int) -> Checkpoint:
    """Read one checkpoint, checking every file against the manifest first.

    Raises:
        UserError: the checkpoint is damaged; the message names the file.
    """
    try:
        manifest = _verify(path)
    except ValueError as error:
        raise UserError(f"--resume: {str(path)!r} cannot be used: {error}") from error
    same = manifest["world_size"] == world_size
    try:
        checkpoint = Checkpoint(
            step=manifest["step"],
            world_size=manifest["world_size"],
            tensors=load_file(path / "model.safetensors") | load_file(path / "optimizer.safetensors"),
            rank_tensors=load_file(path / f"rank-{rank:04d}.safetensors") if same else None,
            state=json.loads((path / "state.json").read_text(encoding="utf-8")),
        )
        return old_runs.translate_checkpoint(checkpoint) if manifest["format"] == old_runs.FORMAT else checkpoint
    except (SafetensorError, ValueError) as error:  # the manifest holds, but was made for something else
        raise UserError(f"--resume: {str(path)!r} cannot be used: {error}") from error


def rng_tensors() -> dict[str, Tensor]:
    """The states of this process's default random generators (torch CPU, this CUDA device, NumPy, Python)."""
    _, keys, position, has_gauss, cached_gauss = np.random.get_state(legacy=True)
    _, words, gauss_next = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*(int(key) for key in keys), int(position), int(has_gauss)], dtype=torch.int64),
        "numpy_gauss": torch.tensor(float(cached_gauss), dtype=torch.float64),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss_next is None else [gauss_next], dtype=torch.float64),
    }
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return {f"rng.{name}": state for name, state in states.items()}


def restore_rng(tensors: Mapping[str, Tensor]) -> None:
    """Put the states of `rng_tensors` back; the CUDA one is used where both sides have it."""
    torch.set_rng_state(tensors["rng.torch"])
    *keys, position, has_gauss = tensors["rng.numpy"].tolist()
    gauss = tensors["rng.numpy_gauss"].item()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    gauss_next = tensors["rng.python_gauss"].tolist()
    random.setstate((3, tuple(tensors["rng.python"].tolist()), gauss_next[0] if gauss_next else None))
    if "rng.cuda" in tensors and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(tensors["rng.cuda"])


def _together(takes_part: bool, work: Callable[[], object], step: int) -> None:
    """Do ``work`` where it is mine, then wait for the other ranks; one that failed makes all of them raise."""
    error: Exception | None = None
    if takes_part:
        try:
            work()
        except Exception as problem:  # the other ranks must hear of any failure
            error = problem
    if any(agree([error is not None])):
        if error is not None and not isinstance(error, (OSError, SafetensorError)):
            raise error
        raise CheckpointError(f"checkpoint of step {step} failed: {error or 'on another rank'}") from error


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _write_manifest(folder: Path, step: int, world_size: int) -> None:
    """Last of all: a folder without it is no checkpoint."""
    paths = [folder / name for name in sorted(_expected_files(world_size))]
    for path in paths:
        if not path.is_file():
            raise OSError(f"{path.name} is not there: the run directory must be on storage that all ranks share")
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths}
    manifest = {"format": FORMAT, "step": step, "world_size": world_size, "files": files}
    write_json(folder / "manifest.json", manifest)
    flush(folder)


def _expected_files(world_size: int) -> set[str]:
    ranks = {f"rank-{rank:04d}.safetensors" for rank in range(world_size)}
    return {"model.safetensors", "optimizer.safetensors", "state.json"} | ranks


def _prune(directory: Path, step: int, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints up to ``step``; later ones belong to a branch that was left."""
    done = [path for path in _newest_first(directory) if path.name[0] != "." and _step_of(path) <= step]
    for path in done[max(keep, 1) :]:
        doomed = directory / f".{path.name}.tmp"  # never half deleted under its own name
        try:
            path.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            logger.warning("cannot delete the old checkpoint %s: %s", path, error)


def _newest_first(directory: Path) -> list[Path]:
    """Folders of checkpoints; one that was being replaced comes after its replacement."""
    paths = [path for path in directory.iterdir() if _step_of(path) >= 0] if directory.is_dir() else []
    return sorted(paths, key=lambda path: (_step_of(path), path.name[0] != "."), reverse=True)


def _step_of(path: Path) -> int:
    """The step in a folder's name, -1 for any other folder."""
    match = _NAME.fullmatch(retired[1] if (retired := _RETIRED.fullmatch(path.name)) else path.name)
    return int(match[1]) if match else -1


def _verify(path: Path) -> dict[str, Any]:
    """The manifest, once everything that it promises holds; ValueError names the file that does not."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"manifest.json: {getattr(error, 'strerror', None) or 'not JSON'}") from error
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version not in (old_runs.FORMAT, FORMAT):
        raise ValueError(f"manifest.json: expected format {FORMAT}, or {old_runs.FORMAT}, got {version!r}")
    step, world_size, files = (manifest.get(key) for key in ("step", "world_size", "files"))
    if step != _step_of(path) or not isinstance(world_size, int) or not isinstance(files, dict):
        raise ValueError("manifest.json: incomplete or of another step")
    if files.keys() != _expected_files(world_size):
        raise ValueError("manifest.json: does not list the files of a checkpoint")
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{name}: missing")
        if not isinstance(entry, dict) or file.stat().st_size != entry.get("bytes"):
            raise ValueError(f"{name}: has {file.stat().st_size} bytes, not those of the manifest")
        if sha256(file) != entry.get("sha256"):
            raise ValueError(f"{name}: its SHA-256 is not that of the manifest")
    return manifest
