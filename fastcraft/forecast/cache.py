"""Estimates kept on disk, so that a plan takes no more than arithmetic the second time."""

import contextlib
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from fastcraft.durable import write_json
from fastcraft.forecast.estimate import StepEstimate
from fastcraft.forecast.networks import Networks
from fastcraft.forecast.phases import estimate_step


def cached_estimate(networks: Networks, *, folder: Path | None = None, **options: Any) -> StepEstimate:
    """`estimate_step`, kept on disk: by what the networks look like, the code that ran and the options.

    Args:
        networks: as for `estimate_step`.
        folder: where estimates are kept; None = ``fastcraft/estimates`` in the person's cache folder.
        options: of `estimate_step`.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "fastcraft" / "estimates" if folder is None else folder
    file = folder / f"{_digest(networks, options)}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not there, or not whole: made again
        return StepEstimate.from_json(json.loads(file.read_text(encoding="utf-8")))
    estimate = estimate_step(networks, **options)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, no more
        write_json(file, estimate.to_json())
    return estimate


def _replaced(module: Any) -> Iterator[tuple[str, str, str]]:
    """(module, attribute, what it is called) of functions and attention processors that an instance has of its own."""
    for name, child in module.named_modules():
        for key, value in child.__dict__.items():
            if callable(value):
                yield name, key, getattr(value, "__qualname__", type(value).__qualname__)


def _digest(networks: Networks, options: Mapping[str, Any]) -> str:
    """Everything that an estimate depends on, as one name."""
    digest = hashlib.sha256()
    modules = [networks.unet, networks.vae, *networks.text_encoders, networks.rewards]
    for module in modules:
        digest.update(repr(module).encode())
        digest.update(repr(list(_replaced(module))).encode())  # a patched module looks like any other
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad}".encode())
    rest = (networks.name, networks.latent_shape, networks.dtype, networks.text_length, sorted(options.items()))
    versions = [metadata.version(name) for name in ("torch", "diffusers", "transformers")]
    digest.update(repr((rest, versions)).encode())
    for package in ("fastcraft", "fastcraft_kernels"):
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or ()) if spec else ():
            for path in sorted(Path(root).rglob("*.py")):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:32]
