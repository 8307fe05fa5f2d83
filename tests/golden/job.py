"""Runs a case as a user does, and says what its numbers depend on besides the code."""

import contextlib
import hashlib
import json
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fastcraft.train import main
from tests.golden.cases import BASE, CASES

ROOT = Path(__file__).parents[2]
VALUES = Path(__file__).parent / "values"
DS_CONFIG = ROOT / "ds_configs" / "zero2_fp32.json"
KEPT = ("step", "loss", "grad_norm", "lr", "rewards")
PACKAGES = ("torch", "numpy", "deepspeed", "diffusers", "transformers", "peft")


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Let torch compute with so many threads; the order of a sum depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fingerprint() -> dict[str, Any]:
    """What makes the last bits: the processor, its instructions that torch uses, versions, the number of threads."""
    return {
        "cpu": _cpu(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def run_case(name: str, num_steps: int, run_dir: Path) -> dict[str, Any]:
    """Train one case and read what it leaves behind.

    Args:
        name: of `CASES`.
        num_steps: optimiser steps.
        run_dir: must not exist.

    Returns:
        ``steps``, for each optimiser step the values of `KEPT`; ``weights``, a digest of the exported text encoder,
        which has every bit of every gradient in it.

    Raises:
        RuntimeError: the run did not end well.
    """
    recipe = run_dir.with_suffix(".toml")
    recipe.write_text(BASE.replace('"tests/golden/', f'"{ROOT}/tests/golden/'), encoding="utf-8")
    settings = {"train.num_steps": num_steps, **CASES[name]}
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    status = main(["--ds_config", str(DS_CONFIG), "--recipe", str(recipe), "--run-dir", str(run_dir), *overrides])
    if status != 0:
        raise RuntimeError(f"case {name!r} ended with status {status}")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    weights = load_file(run_dir / "export" / "text_encoder" / "model.safetensors")
    digest = hashlib.sha256()
    for _, tensor in sorted(weights.items()):
        digest.update(tensor.numpy().tobytes())
    return {"steps": [{key: row[key] for key in KEPT} for row in rows], "weights": digest.hexdigest()}


def read(name: str) -> dict[str, Any]:
    """What was recorded of a case."""
    return json.loads((VALUES / f"{name}.json").read_text(encoding="utf-8"))


def write(name: str, recorded: dict[str, Any]) -> None:
    """Keep what was recorded, one optimiser step per line; a float is written with all its bits."""
    parts = []
    for key, value in recorded.items():
        if isinstance(value, dict) and "steps" in value:
            rows = ",\n    ".join(json.dumps(row) for row in value["steps"])
            shown = f'{{"weights": "{value["weights"]}", "steps": [\n    {rows}\n  ]}}'
        elif isinstance(value, list):
            shown = "[\n    " + ",\n    ".join(json.dumps(item) for item in value) + "\n  ]"
        else:
            shown = json.dumps(value)
        parts.append(f"  {json.dumps(key)}: {shown}")
    VALUES.mkdir(exist_ok=True)
    (VALUES / f"{name}.json").write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of one optimiser step by name, rewards flattened."""
    rewards = {f"rewards.{name}": value for name, value in row["rewards"].items()}
    return {**{key: row[key] for key in KEPT if key not in ("step", "rewards")}, **rewards}


def _cpu() -> str:
    """Name, family and model: the name alone is often that of a whole generation."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return ", ".join(f"{key} {found[key]}" for key in ("model name", "cpu family", "model") if key in found)
