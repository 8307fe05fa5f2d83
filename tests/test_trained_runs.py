"""Whole runs of every trained part: resumed to the last bit, on two ranks as on one, exported, begun again."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastcraft.engine.interrupt import StopRequested
from fastcraft.objectives.reward_backprop import RewardBackprop
from fastcraft.train import main
from tests.test_launcher import finish, launch

ROOT = Path(__file__).parents[1]
DS_CONFIG = str(ROOT / "ds_configs" / "zero2.json")
LORA = 'mode = "lora"\nrank = 4\nlearning_rate = 2e-3\n'
FULL = 'mode = "full"\nlearning_rate = 5e-4\n'
TRAINED = {
    "text": f"[trained.text]\n{FULL}",
    "text lora": f"[trained.text]\n{LORA}",
    "unet": f"[trained.unet]\n{FULL}ema_decay = 0.9\n",
    "unet lora": f'[trained.unet]\n{LORA}targets = ["linear"]\n',
    "both": f"[trained.text]\n{FULL}[trained.unet]\n{FULL}",
    "both lora": f"[trained.text]\n{LORA}[trained.unet]\n{LORA}",
}
MODES = [(name, "float32") for name in TRAINED] + [("unet", "bfloat16"), ("both lora", "bfloat16")]


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
def write_recipe(tiny_pipeline, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(["a red cat", "a blue dog", "a red dog", "a blue cat"]), encoding="utf-8")

    def write(trained, *, dtype="float32", batch_size=2):
        path = tmp_path / "recipe.toml"
        path.write_text(f"""
{TRAINED[trained]}
[model]
path = "{tiny_pipeline}"
[prompts]
path = "{prompts}"
[sampler]
num_inference_steps = 4
guidance_scale = 3.0
[objective]
backprop_steps = 2
[[rewards]]
name = "brightness"
[train]
num_steps = 4
batch_size = {batch_size}
dtype = "{dtype}"
checkpoint_every = 2
[evaluate]
every = 0
num_samples = 2
""")
        return str(path)

    return write


def run(recipe, run_dir, *extra):
    return main(["--ds_config", DS_CONFIG, "--recipe", recipe, "--run-dir", str(run_dir), *extra])


def losses(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in rows]


def exported(run_dir):
    """File -> tensors of everything exported."""
    files = sorted((run_dir / "export").rglob("*.safetensors"))
    return {str(file.relative_to(run_dir)): load_file(file) for file in files}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for file in expected:
        assert found[file].keys() == expected[file].keys()
        assert all(torch.equal(found[file][name], tensor) for name, tensor in expected[file].items()), file


@pytest.mark.parametrize(("trained", "dtype"), MODES)
def test_a_stopped_run_goes_on_to_the_last_bit(write_recipe, tmp_path, monkeypatch, trained, dtype):
    recipe = write_recipe(trained, dtype=dtype)
    assert run(recipe, tmp_path / "whole") == 0
    whole_step, calls = RewardBackprop.step, []

    def stopped_step(self, micro):
        calls.append(1)
        if len(calls) == 4:  # in the middle of the fourth update: the third is saved by the stop
            raise StopRequested("a test")
        return whole_step(self, micro)

    monkeypatch.setattr(RewardBackprop, "step", stopped_step)
    assert run(recipe, tmp_path / "cut") == 143
    assert (tmp_path / "cut" / "checkpoints" / "step-000003").is_dir()
    assert not (tmp_path / "cut" / "export").exists()
    assert run(recipe, tmp_path / "cut", "--resume") == 0
    assert len(calls) > 4
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    expected = exported(tmp_path / "whole")
    assert expected
    assert_equal(exported(tmp_path / "cut"), expected)


def test_two_ranks_train_every_part_as_one_does(write_recipe, tmp_path):
    one = launch("--recipe", write_recipe("both"), "--run-dir", str(tmp_path / "one"))
    code, output = finish(one)
    assert code == 0, output
    two = launch("--recipe", write_recipe("both", batch_size=1), "--run-dir", str(tmp_path / "two"), ranks=2)
    code, output = finish(two)
    assert code == 0, output
    for (_, loss, norm, _), (_, other_loss, other_norm, _) in zip(
        losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True
    ):
        assert other_loss == pytest.approx(loss, rel=1e-4)
        assert other_norm == pytest.approx(norm, rel=1e-3)
    expected = exported(tmp_path / "one")
    assert set(expected) == {
        "export/text_encoder/model.safetensors", "export/unet/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    for file, tensors in exported(tmp_path / "two").items():
        assert all((tensors[name] - expected[file][name]).abs().max() < 2e-4 for name in tensors), file


@pytest.mark.parametrize("first", ["text", "text lora"])
def test_one_part_after_the_other_begins_where_the_first_ended(write_recipe, tmp_path, first):
    assert run(write_recipe(first), tmp_path / "first") == 0
    start = f"trained.text.start={tmp_path / 'first'}"
    settings = ["--set", "trained.text.mode=none", "--set", start, "--set", "text.prefix_encoder=trained"]
    assert run(write_recipe("unet lora"), tmp_path / "second", *settings) == 0
    rows = [json.loads(line) for line in (tmp_path / "first" / "evaluations.jsonl").read_text().splitlines()]
    after_first = rows[-1]["evaluation"]["reward/total"]
    rows = [json.loads(line) for line in (tmp_path / "second" / "evaluations.jsonl").read_text().splitlines()]
    assert rows[0]["evaluation"]["reward/total"] == pytest.approx(after_first, rel=1e-4)
    assert rows[-1]["evaluation"]["reward/total"] > after_first
    assert set(exported(tmp_path / "second")) == {
        "export/lora/kohya.safetensors", "export/lora/pytorch_lora_weights.safetensors",
    }  # fmt: skip


def test_a_unet_begins_at_what_another_run_exported(write_recipe, tmp_path):
    assert run(write_recipe("unet"), tmp_path / "first") == 0
    assert run(write_recipe("unet"), tmp_path / "second", "--set", f"trained.unet.start={tmp_path / 'first'}") == 0
    first, second = (
        json.loads((tmp_path / name / "evaluations.jsonl").read_text().splitlines()[number])["evaluation"][
            "reward/total"
        ]
        for name, number in (("first", -1), ("second", 0))
    )
    assert second == pytest.approx(first, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["memory.policy=batched:2", "objective.input_grad=false"],
            "memory.policy: 'batched:2' differentiates the text",
        ),
        (["kernels.compile=prefix"], "kernels.compile must be 'none' with trained.unet.mode = 'lora'"),
        (["kernels.cuda_graphs=all"], "kernels.cuda_graphs must be 'none' with trained.unet.mode = 'lora'"),
        (["memory.prefix_reuse=2"], "memory.prefix_reuse and memory.prefix_store keep what a frozen UNet makes"),
        (["trained.unet.mode=none"], "trained: at least one part must have a mode other than 'none'"),
        (["trained.vae.mode=full"], "trained: a part is one of text, unet, got 'vae'"),
        (['trained.unet.targets=["to_z"]'], "trained.unet.targets: no linear layer or convolution is named 'to_z'"),
        (["trained.unet.start=nowhere"], "trained.unet.start: nowhere: there is no such file or folder"),
        (["trained.unet.rank=0"], "trained.unet.rank must be at least 1, got 0"),
    ],
)
def test_what_would_lose_a_gradient_or_is_not_there_is_one_line(write_recipe, tmp_path, capsys, settings, message):
    overrides = [part for setting in settings for part in ("--set", setting)]
    assert run(write_recipe("unet lora"), tmp_path / "run", *overrides) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert line.startswith(f"fastcraft: error: {message}")
    assert not (tmp_path / "run").exists()
