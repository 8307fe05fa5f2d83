"""A run under ``auto`` that runs out of memory: the next plan, said once, and not a number lost."""

import json
from pathlib import Path

import pytest
import torch

from fastcraft.families.unet import UNetNetwork
from fastcraft.text.encoder import TextEncoder
from fastcraft.train import main

DS_CONFIG = str(Path(__file__).parents[2] / "ds_configs" / "zero2.json")


@pytest.fixture(scope="module", autouse=True)
def process_group():
    from fastcraft.engine.agreement import close_distributed
    from fastcraft.engine.zero2 import init_distributed

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # bit-equality across runs
    opened = init_distributed("cpu")
    yield
    if opened:
        close_distributed()
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recipe(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out_of_memory")
    (folder / "prompts.txt").write_text("a red cat\na blue dog\na red dog\n")
    path = folder / "tiny.toml"
    path.write_text(
        f"""
[model]
path = "{tiny_pipeline}"
[prompts]
path = "{folder / "prompts.txt"}"
[sampler]
num_inference_steps = 3
guidance_scale = 3.0
[objective]
backprop_steps = 2
normalize_rewards = "running_std"
[[rewards]]
name = "brightness"
[memory]
policy = "auto"
[train]
num_steps = 2
batch_size = 2
dtype = "float32"
learning_rate = 1e-3
checkpoint_every = 0
[evaluate]
every = 0
num_samples = 1
"""
    )
    return path


@pytest.fixture(autouse=True)
def estimates(recipe, monkeypatch):
    """The estimate is made once for all tests of this file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(recipe.parent / "cache"))


def run(recipe, out, *sets):
    overrides = [item for value in sets for item in ("--set", value)]
    return main(["--ds_config", DS_CONFIG, "--recipe", str(recipe), "--run-dir", str(out), *overrides])


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def unbroken(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "run"
    assert run(recipe, out, "memory.policy=none") == 0
    return losses(out)


class Full:
    """Around `UNetNetwork.predict`: the first call with gradient runs out of memory, there or in its backward."""

    def __init__(self, monkeypatch, where, times=1):
        self.predict, self.where, self.left = UNetNetwork.predict, where, times
        monkeypatch.setattr(UNetNetwork, "predict", lambda *args, **kwargs: self(*args, **kwargs))

    def __call__(self, *args, **kwargs):
        output = self.predict(*args, **kwargs)
        real = type(output) is torch.Tensor  # the estimate runs the same code on fake ones
        if real and torch.is_grad_enabled() and self.left:
            if self.where == "forward":
                self.fail()
            output.register_hook(self.fail)
        return output

    def fail(self, *_):
        if self.left:
            self.left -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_step_is_done_again_with_less(recipe, tmp_path, monkeypatch, capsys, unbroken, where):
    full = Full(monkeypatch, where)
    assert run(recipe, tmp_path / "run") == 0
    assert full.left == 0
    assert losses(tmp_path / "run") == unbroken  # to the last bit: same data, noise and reward statistics
    printed = "".join(capsys.readouterr())
    assert printed.count("out of memory under") == 1
    assert "step 1: out of memory under 2 keep" in printed


def test_memory_that_runs_out_inside_the_encoder_ends_the_run(recipe, tmp_path, monkeypatch, capsys):
    """There gradients are half added up: doing the step again would count them twice."""
    forward = TextEncoder.forward

    def failing(self, input_ids):
        inner = forward(self, input_ids)
        if inner.requires_grad and type(inner) is torch.Tensor:
            inner.register_hook(fail)
        return inner * 1

    def fail(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB\nmore")

    monkeypatch.setattr(TextEncoder, "forward", failing)
    assert run(recipe, tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert "out of memory in the backward pass of a trained part, where gradients are being added up" in error
    assert "Tried to allocate 20.00 MiB" in error


def test_the_end_of_the_way_down_is_said(recipe, tmp_path, monkeypatch, capsys):
    Full(monkeypatch, "forward", times=99)
    assert run(recipe, tmp_path / "run") == 1
    assert "out of memory under the smallest plan" in capsys.readouterr().err


def test_another_policy_does_not_change_by_itself(recipe, tmp_path, monkeypatch, capsys):
    Full(monkeypatch, "forward")
    assert run(recipe, tmp_path / "run", "memory.policy=none") == 1
    assert "memory.policy = 'auto' plans with less by itself" in capsys.readouterr().err


def test_a_budget_that_nothing_meets_is_refused_before_training(recipe, tmp_path, capsys):
    assert run(recipe, tmp_path / "run", "memory.budget_gib=1e-6") == 2
    assert "nothing fits on this CPU: batch 2 at depth 2 takes at least" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
