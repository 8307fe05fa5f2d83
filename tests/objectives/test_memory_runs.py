"""Whole runs of the main job, through the engine: reused prefixes resume exactly, the head first trains alike."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastcraft.train import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def process_group():
    from fastcraft.engine.agreement import close_distributed
    from fastcraft.engine.zero2 import init_distributed

    opened = init_distributed("cpu")
    yield
    if opened:
        close_distributed()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # bit-equality across runs
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(tiny_pipeline, tmp_path):
    """``run(name, *settings)`` trains four steps of the tiny model; returns its directory."""
    (tmp_path / "prompts.txt").write_text("a red cat\na blue dog\na red dog\na blue cat\na dog\n")
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(
        f"""
[model]
path = "{tiny_pipeline}"
[prompts]
path = "{tmp_path / "prompts.txt"}"
[sampler]
num_inference_steps = 4
guidance_scale = 3.0
eta = 0.5
[objective]
backprop_steps = 2
normalize_rewards = "running_std"
[[rewards]]
name = "brightness"
[train]
num_steps = 4
batch_size = 2
dtype = "float32"
learning_rate = 1e-3
checkpoint_every = 1
keep_checkpoints = 4
[evaluate]
every = 0
num_samples = 1
"""
    )

    def start(name, *settings, resume=False):
        argv = ["--ds_config", str(ROOT / "ds_configs" / "zero2.json"), "--recipe", str(recipe)]
        argv += ["--run-dir", str(tmp_path / name), *(["--resume"] if resume else [])]
        for setting in settings:
            argv += ["--set", setting]
        assert main(argv) == 0
        return tmp_path / name

    return start


def column(run_dir, name):
    return [json.loads(line)[name] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def weights(run_dir):
    return load_file(run_dir / "checkpoints" / "step-000004" / "model.safetensors")


def test_a_run_that_reuses_prefixes_resumes_to_the_last_bit(run, tmp_path):
    """Stopped in the second pass over the pool: the store in memory is gone, and what it held is made again."""
    reuse = ["memory.prefix_reuse=2", "memory.prefix_pool=4"]
    whole, parts = run("whole", *reuse), run("parts", *reuse)
    assert column(whole, "prefix_reused") == [0, 0, 1, 1]
    assert all(seconds > 0 for seconds in column(whole, "step_time_s"))
    (parts / "checkpoints" / "step-000004" / "model.safetensors").write_bytes(b"torn")
    (parts / "checkpoints" / "step-000003" / "model.safetensors").write_bytes(b"torn")
    run("parts", *reuse, resume=True)
    assert column(parts, "prefix_reused") == [0, 0, 0, 0]  # steps 3 and 4 again
    assert column(parts, "loss") == column(whole, "loss")
    a, b = weights(parts), weights(whole)
    assert all(torch.equal(a[name], b[name]) for name in b)

    disk = [*reuse, f"memory.prefix_store={tmp_path / 'prefixes'}"]
    first, second = run("first", *disk), run("second", *disk, "train.learning_rate=2e-3")
    assert column(first, "prefix_reused") == [0, 0, 1, 1]
    assert column(second, "prefix_reused") == [1, 1, 1, 1]  # another run finds them
    c = weights(first)
    assert all(torch.equal(c[name], b[name]) for name in b)
    other = run("other", *disk, "sampler.guidance_scale=2.0")
    assert column(other, "prefix_reused") == [0, 0, 1, 1]  # other settings do not


def test_the_head_first_trains_alike_under_accumulation(run):
    """Running statistics, two micro-steps per update: one engine backward each."""
    settings = ["train.gradient_accumulation_steps=2", "memory.policy=sac:attention+conv"]
    whole = run("whole", *settings)
    parts = run("parts", *settings, "memory.decode_micro_batch=1")
    for name in ("loss", "grad_norm"):
        assert column(parts, name) == pytest.approx(column(whole, name), rel=1e-3)
    a, b = weights(parts), weights(whole)
    largest = max((a[name] - b[name]).abs().max().item() for name in b)
    assert largest < 1e-4  # a tenth of one update at this learning rate
