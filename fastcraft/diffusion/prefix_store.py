"""Latents after the frozen steps, kept for the next time that the same prompts and noise come by.

The T - K steps before the first one with gradient are driven by the frozen original encoder, so what they give is a
fixed function of model, sampler, prompt and seed. An entry is a whole micro-batch: its rows come back exactly as they
were made, whatever the batch they were made in does to rounding, and a lost entry is made again to the last bit.

Shape letters: B samples; C, h, w of the latents.
"""

import contextlib
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastcraft.durable import write_tensors
from fastcraft.errors import UserError

_SUFFIX = ".prefix.safetensors"


class PrefixStore(Protocol):
    """Entries by key; a store may forget any of them at any time."""

    def get(self, key: str) -> Tensor | None:
        """The entry, on the CPU, or None."""

    def put(self, key: str, latents: Tensor) -> None:
        """Keep an entry."""


class MemoryStore:
    """Entries in this process's memory; the oldest go first.

    Args:
        max_bytes: bound of all entries together.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes = 0

    def get(self, key: str) -> Tensor | None:
        """The entry, on the CPU, or None."""
        return self._entries.get(key)

    def put(self, key: str, latents: Tensor) -> None:
        """Keep an entry; one larger than the bound is not kept."""
        if key in self._entries or latents.nbytes > self.max_bytes:
            return
        self._entries[key] = latents.detach().cpu().clone()
        self._bytes += latents.nbytes
        while self._bytes > self.max_bytes:
            self._bytes -= self._entries.popitem(last=False)[1].nbytes


class DiskStore:
    """One safetensors file per entry, shared by any number of ranks and runs; the oldest files go first.

    A file appears whole or not at all, and carries the SHA-256 of its contents: one that is torn, altered or of another
    key is deleted and counts as missing. Two ranks that write the same entry write the same file.

    Args:
        folder: made if need be.
        max_bytes: bound of all files together.

    Raises:
        UserError: the folder cannot be made or written to.
    """

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.num_corrupt = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {str(folder)!r}: {error.strerror}") from error
        if not os.access(folder, os.W_OK):
            raise UserError(f"the folder must be writable, got {str(folder)!r}")

    def get(self, key: str) -> Tensor | None:
        """The entry, on the CPU, or None."""
        from safetensors import SafetensorError, safe_open

        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                latents, metadata = file.get_tensor("latents"), file.metadata()
            if metadata.get("key") == key and metadata.get("sha256") == _digest([latents]):
                return latents
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, AttributeError):
            pass  # torn or altered: dropped below
        self.num_corrupt += 1
        path.unlink(missing_ok=True)
        return None

    def put(self, key: str, latents: Tensor) -> None:
        """Keep an entry; a full disk loses it, not the run."""
        path = self._path(key)
        latents = latents.detach().cpu().contiguous()
        if path.exists() or latents.nbytes > self.max_bytes:
            return
        try:
            write_tensors(path, {"latents": latents}, metadata={"key": key, "sha256": _digest([latents])})
        except OSError:
            return
        self._evict(keep=path)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{_SUFFIX}"

    def _evict(self, *, keep: Path) -> None:
        files = []
        for path in self.folder.glob(f"*{_SUFFIX}*"):  # drafts that killed ranks left behind too
            with contextlib.suppress(OSError):  # another rank deleted it
                status = path.stat()
                files.append((status.st_mtime_ns, path.name, status.st_size, path))
        total = sum(size for _, _, size, _ in files)
        for _, _, size, path in sorted(files):
            if total <= self.max_bytes:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                total -= size


@dataclass(frozen=True, kw_only=True)
class Prefixes:
    """A store for one model and one set of settings.

    ``context`` stands for everything but prompts and noise, see `prefix_context`.
    """

    store: PrefixStore
    context: str

    def fetch(self, prompts: Sequence[str], seeds: Sequence[int], make: Callable[[], Tensor]) -> tuple[Tensor, bool]:
        """The latents of a micro-batch, and whether they were there.

        Args:
            prompts: B strings.
            seeds: B noise seeds.
            make: computes the latents ``(B, C, h, w)`` on the device in use.
        """
        content = json.dumps([self.context, list(prompts), list(seeds)])
        key = hashlib.sha256(content.encode()).hexdigest()
        kept = self.store.get(key)
        if kept is not None:
            return kept, True
        latents = make()
        self.store.put(key, latents)
        return latents, False


def prefix_context(networks: Sequence[nn.Module], settings: dict[str, Any]) -> str:
    """A digest of all weights, dtypes and settings that the prefix depends on.

    Reads every weight once: seconds for Stable Diffusion.

    Args:
        networks: UNet and original text encoder.
        settings: sampler, number of steps, guidance, size; plain values.
    """
    weights = _digest(tensor for network in networks for tensor in network.state_dict().values())
    configs = [str(getattr(network, "config", "")) for network in networks]
    text = json.dumps([weights, configs, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
