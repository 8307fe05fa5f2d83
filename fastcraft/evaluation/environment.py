"""What a run ran on: versions, devices, commit. Nothing that says whose machine it was or where files lie."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastcraft

PACKAGES = ("torch", "deepspeed", "diffusers", "transformers", "triton", "xformers", "peft")


def environment() -> dict[str, Any]:
    """Versions, git commit of the checkout, devices, cores and system of this process.

    Returns:
        ``versions`` {name: version or None}, ``git_commit`` and ``git_modified`` (None outside a checkout), ``devices``
        (name, memory in MiB, compute capability), ``cuda``, ``cpu``, ``num_cores``, ``memory_mib``, ``os``,
        ``machine``, ``world_size``. No token, user name, host name or path.
    """
    commit, modified = _git()
    return {
        "versions": _versions(),
        "git_commit": commit,
        "git_modified": modified,
        "devices": _devices(),
        "cuda": torch.version.cuda,
        "cpu": _cpu_name(),
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_mib": _memory_mib(),
        "os": _os_name(),
        "machine": platform.machine(),
        "world_size": _world_size(),
    }


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"fastcraft": fastcraft.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _git() -> tuple[str | None, bool | None]:
    """Commit and whether tracked files differ from it; only when the package lies at the top of its own checkout."""
    root = Path(fastcraft.__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None, None
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _devices() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": p.name, "memory_mib": p.total_memory // 2**20, "compute_capability": f"{p.major}.{p.minor}"}
        for p in properties
    ]


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _memory_mib() -> int:
    import psutil

    return psutil.virtual_memory().total // 2**20


def _os_name() -> str:
    """Distribution, else the system's name; the kernel's release is left out, as it may carry a builder's name."""
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()


def _world_size() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))
