"""A run that is watched by held-out rewards: it says when they contradict it, or ends."""

import json
from pathlib import Path

import pytest

from fastcraft.train import main

ROOT = Path(__file__).parents[1]

FUNCTIONS = '''
"""The trained reward rises at every evaluation; of the held-out ones, one falls."""

import torch

calls = {"rising": 0, "sinking": 0}


def count(name):
    calls[name] += not torch.is_grad_enabled()
    return calls[name]


def rising(images, prompts):
    return images.mean(dim=(1, 2, 3)) + 10 * (0 if images.requires_grad else count("rising"))


def sinking(images, prompts):
    return [-float(count("sinking"))] * len(prompts)


def steady(images, prompts):
    return [1.0] * len(prompts)
'''


@pytest.fixture(scope="module", autouse=True)
def process_group():
    """One group for every run in this process, as in test_train.py."""
    from fastcraft.engine.agreement import close_distributed
    from fastcraft.engine.zero2 import init_distributed

    opened = init_distributed("cpu")
    yield
    if opened:
        close_distributed()


@pytest.fixture
def run(tiny_pipeline, tmp_path, monkeypatch):
    (tmp_path / "held_out_functions.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "held_out_functions", raising=False)
    (tmp_path / "prompts.txt").write_text("a red cat\na blue dog\n")
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(
        f"""
[model]
path = "{tiny_pipeline}"
[prompts]
path = "{tmp_path / "prompts.txt"}"
[sampler]
num_inference_steps = 2
guidance_scale = 1.0
[objective]
backprop_steps = 1
[[rewards]]
name = "callable"
label = "trained"
options = {{ function = "held_out_functions:rising", differentiable = true }}
[[held_out]]
name = "callable"
label = "sinking"
options = {{ function = "held_out_functions:sinking" }}
[[held_out]]
name = "callable"
label = "steady"
options = {{ function = "held_out_functions:steady" }}
[train]
num_steps = 5
batch_size = 2
dtype = "float32"
learning_rate = 1e-4
checkpoint_every = 0
[evaluate]
every = 1
num_samples = 2
held_out_patience = 2
"""
    )

    def go(*extra):
        config = str(ROOT / "ds_configs" / "zero2.json")
        return main(["--ds_config", config, "--recipe", str(recipe), "--run-dir", str(tmp_path / "run"), *extra])

    go.dir = tmp_path / "run"
    return go


def rows(run, name="evaluations.jsonl"):
    return [json.loads(line) for line in (run.dir / name).read_text().splitlines()]


def test_a_contradicted_run_ends_and_stays_ended(run):
    stop = ("--set", "evaluate.held_out_action=stop")
    assert run(*stop) == 0
    assert [row["step"] for row in rows(run, "metrics.jsonl")] == [1, 2, 3], "evaluations 1, 2, 3: two comparisons"
    flags = [row["evaluation"].get("grid/held_out_falling") for row in rows(run)]
    assert flags == [None, 0.0, 0.0, 1.0, 1.0], "the last line is the evaluation after the run, at the same step"
    assert rows(run)[3]["evaluation"]["grid/held_out/steady"] == 1.0
    report = (run.dir / "report.html").read_text()
    assert "step 3: held out sinking fell while the trained total rose, 2 evaluations in a row; the run ends" in report
    assert (run.dir / "export" / "text_encoder" / "model.safetensors").is_file()
    assert run(*stop, "--resume") == 0
    assert len(rows(run, "metrics.jsonl")) == 3


def test_an_alarm_leaves_the_run_going(run, capsys):
    assert run("--set", "train.num_steps=4") == 0
    assert [row["step"] for row in rows(run, "metrics.jsonl")] == [1, 2, 3, 4]
    printed = capsys.readouterr()
    assert "step 3: held out sinking fell" in printed.out + printed.err
    assert "the run ends here" not in printed.out + printed.err


def test_dry_run_builds_the_held_out_rewards_too(run, capsys):
    assert run("--set", "held_out.0.name=hpsv2", "--set", "held_out.0.options={}", "--dry-run") == 2
    assert "'hpsv2' needs HPS_v2_compressed.pt: not in the hub cache" in capsys.readouterr().err
    assert not run.dir.exists()
