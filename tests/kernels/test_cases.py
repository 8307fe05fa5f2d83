"""Runs each op's ``cases.py``: the Triton source in the interpreter, and compiled where there is a CUDA device."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
CASES = sorted(Path(__file__).parent.glob("*/cases.py"))
TRITON = tuple(int(part) for part in version("triton").split(".")[:2])


def run_cases(path: Path, *, interpret: bool) -> None:
    """One process for each file: Triton reads the variable when a kernel is decorated."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    environment |= {"TRITON_INTERPRET": str(int(interpret)), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", str(path), "-p", "no:cacheprovider", "--color=no", "--tb=short"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


def test_every_op_has_cases():
    folders = {path.parent.name for path in (ROOT / "kernels" / "fastcraft_kernels").glob("*/kernel.py")}
    assert folders == {path.parent.name for path in CASES}


@pytest.mark.skipif(TRITON < (3, 7), reason="Triton 3.6's interpreter cannot loop up to a run-time bound")
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.parent.name)
def test_triton_source_under_the_interpreter(path):
    run_cases(path, interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.parent.name)
def test_triton_source_compiled(path):
    run_cases(path, interpret=False)
