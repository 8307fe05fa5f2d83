"""The main job on a CUDA device: run with ``pytest -m gpu`` on a machine that has one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def train(tmp_path, *settings, name="run"):
    """Two steps of the bundled model in a process of its own; returns its metrics and output."""
    out = tmp_path / name
    command = [sys.executable, "fastcraft/train.py", "--ds_config", "ds_configs/zero2.json", "--run-dir", str(out)]
    sizes = ["train.num_steps=2", "train.batch_size=2", "evaluate.num_samples=2", "evaluate.exam_num_samples=2"]
    for setting in [*sizes, *settings]:
        command += [setting] if setting.startswith("--") else ["--set", setting]
    environment = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'kernels'}:{os.environ.get('PYTHONPATH', '')}"
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    lines = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []
    return [json.loads(line) for line in lines], result.stdout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("text", ["full", "lora"])
def test_a_run_on_the_gpu(tmp_path, dtype, text):
    rows, output = train(tmp_path, f"train.dtype={dtype}", f"trained.text.mode={text}")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["loss"] is not None and row["peak_memory_mib"] > 0 and not row["skipped"] for row in rows)
    assert "reloaded, largest difference" in output


def test_dry_run_counts_on_the_gpu(tmp_path):
    _, output = train(tmp_path, "--dry-run")
    assert "GFLOP" in output


def test_the_gpu_gives_the_gradient_of_the_cpu(tmp_path):
    """The first step's loss and gradient norm in float32, on both devices."""
    on_gpu, _ = train(tmp_path, "train.dtype=float32")
    os.environ["CUDA_VISIBLE_DEVICES"], before = "", os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        on_cpu, _ = train(tmp_path, "train.dtype=float32", name="cpu")
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
    assert on_gpu[0]["loss"] == pytest.approx(on_cpu[0]["loss"], rel=1e-3)
    assert on_gpu[0]["grad_norm"] == pytest.approx(on_cpu[0]["grad_norm"], rel=2e-2)


@pytest.fixture(scope="module")
def eager_rows(tmp_path_factory):
    """dtype -> metrics of a run without switches."""
    return {d: train(tmp_path_factory.mktemp(d), f"train.dtype={d}")[0] for d in ("float32", "bfloat16")}


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        ("float32", ("kernels.cuda_graphs=all", "memory.policy=none")),
        ("bfloat16", ("kernels.cuda_graphs=prefix",)),
        ("bfloat16", ("kernels.cuda_graphs=all", "memory.policy=step")),
        ("bfloat16", ("kernels.compile=blocks",)),
        ("bfloat16", ("kernels.compile=whole", "kernels.cuda_graphs=all", "memory.policy=last_k_live:2")),
    ],
)
def test_graphs_and_compiled_code_train_like_eager(tmp_path, eager_rows, dtype, settings):
    """The check at the start of the run passes, and what two steps then give is what they give without."""
    rows, output = train(tmp_path, f"train.dtype={dtype}", *settings)
    assert "ready after" in output
    loose, eager = 1 if dtype == "float32" else 20, eager_rows[dtype]
    assert rows[0]["loss"] == pytest.approx(eager[0]["loss"], rel=1e-3 * loose)
    assert rows[0]["grad_norm"] == pytest.approx(eager[0]["grad_norm"], rel=5e-3 * loose)
