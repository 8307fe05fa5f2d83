"""A run directory from before there were parts to train is resumed to the last bit; other formats are refused."""

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastcraft.config import load_recipe
from fastcraft.durable import sha256
from fastcraft.engine.checkpoint import find_checkpoint, load_checkpoint
from fastcraft.engine.old_runs import load_run_recipe
from fastcraft.errors import UserError
from fastcraft.train import main

ROOT = Path(__file__).parents[1]
OLD_NAME = re.compile(r"(param|exp_avg|exp_avg_sq)\.text\.")


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


@pytest.fixture
def run(tmp_path, tiny_pipeline, monkeypatch):
    monkeypatch.setattr("fastcraft.build.export.export_run", lambda *args, **kwargs: [])  # not what is looked at here
    (tmp_path / "prompts.txt").write_text("a red cat\na blue dog\na red dog\n")
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
[objective]
backprop_steps = 2
normalize_rewards = "running_std"
[[rewards]]
name = "brightness"
[train]
num_steps = 4
batch_size = 1
dtype = "float32"
learning_rate = 1e-3
checkpoint_every = 2
[evaluate]
every = 0
num_samples = 1
"""
    )

    def go(out, *extra):
        config = str(ROOT / "ds_configs" / "zero2.json")
        return main(["--ds_config", config, "--recipe", str(recipe), "--run-dir", str(out), *extra])

    return go


def old_names(tensors):
    """As the engine and PEFT named them."""
    renamed = {OLD_NAME.sub(r"\1.", name): tensor for name, tensor in tensors.items()}
    return {re.sub(r"\.lora_([AB])\.weight$", r".lora_\1.default.weight", name): t for name, t in renamed.items()}


def make_old(folder):
    """Rewrite a checkpoint of today's as one of format 1."""
    model, optimizer, state = (folder / name for name in ("model.safetensors", "optimizer.safetensors", "state.json"))
    save_file(old_names(load_file(model)), model)
    rest = load_file(optimizer)
    counters = json.loads(state.read_text())
    counters["samples_seen"] = int(rest.pop("objective.samples_seen"))
    assert counters.pop("rounds") == 2
    assert not [name for name in rest if name.startswith("objective.")]
    save_file(old_names(rest), optimizer)
    state.write_text(json.dumps(counters, indent=1))
    remake_manifest(folder, format=1)


def remake_manifest(folder, **changes):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, entry in manifest["files"].items():
        entry |= {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    path.write_text(json.dumps(manifest | changes))


def make_old_recipe(path):
    """The keys of ``[trained.text]`` that there were, in ``[text]``."""
    text = path.read_text()
    trained = tomllib.loads(text)["trained"]["text"]
    before, _, after = text.partition("[trained.text]\n")
    old = (
        f'[text]\ntrain = "{trained["mode"]}"\nlora_rank = {trained["rank"]}\nlora_alpha = {trained["alpha"]}\n'
        f"gradient_checkpointing = {str(trained['gradient_checkpointing']).lower()}\n"
    )
    path.write_text(before.replace("[text]\n", old) + after.partition("\n\n")[2])
    assert "trained" not in tomllib.loads(path.read_text())


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_an_old_run_goes_on_to_the_last_bit(run, tmp_path, mode, capsys):
    settings = ["--set", f"trained.text.mode={mode}", "--set", "trained.text.rank=2", "--set", "trained.text.alpha=4"]
    whole, old = tmp_path / "whole", tmp_path / "old"
    assert run(whole, *settings) == 0
    shutil.copytree(whole, old)
    shutil.rmtree(old / "checkpoints" / "step-000004")
    make_old(old / "checkpoints" / "step-000002")
    make_old_recipe(old / "recipe.toml")
    assert load_run_recipe(old / "recipe.toml") == load_recipe(str(whole / "recipe.toml"))
    other = ["--set", "trained.text.alpha=8"]
    assert run(old, *settings, *other, "--resume") == 2
    assert "belongs to another recipe: trained.text.alpha is 4.0 there, 8.0 here" in capsys.readouterr().err
    assert run(old, *settings, "--resume") == 0
    for name in ("loss", "rewards", "grad_norm", "lr"):
        assert [row[name] for row in lines(old)] == [row[name] for row in lines(whole)]
    for file in ("model.safetensors", "optimizer.safetensors", "rank-0000.safetensors"):
        a, b = (load_file(folder / "checkpoints" / "step-000004" / file) for folder in (whole, old))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    state = [json.loads((folder / "checkpoints" / "step-000004" / "state.json").read_text()) for folder in (whole, old)]
    assert state[0] == state[1]
    assert load_recipe(str(old / "recipe.toml")) == load_recipe(str(whole / "recipe.toml"))  # in today's keys


def test_what_is_no_old_checkpoint_is_one_line(run, tmp_path):
    out = tmp_path / "run"
    assert run(out, "--set", "train.num_steps=2") == 0
    folder = out / "checkpoints" / "step-000002"
    for number in (0, 3, "2", None):
        remake_manifest(folder, format=number)
        with pytest.raises(UserError) as error:
            find_checkpoint(folder.parent)
        assert f"step-000002: manifest.json: expected format 2, or 1, got {number!r}" in str(error.value)
        assert "\n" not in str(error.value)
    remake_manifest(folder, format=2)
    make_old(folder)
    (folder / "state.json").write_text("{}")
    remake_manifest(folder)
    with pytest.raises(UserError, match=r"cannot be used: state\.json: samples_seen is missing"):
        load_checkpoint(folder, rank=0, world_size=1)


def test_a_part_that_only_one_of_two_recipes_has_is_a_difference(run, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(out, "--set", "train.num_steps=2") == 0
    assert run(out, "--resume", "--set", "trained.unet.mode=lora") == 2
    assert "another recipe: trained.unet.mode is None there, 'lora' here" in capsys.readouterr().err
    (out / "recipe.toml").write_text((out / "recipe.toml").read_text() + "\n[trained.unet]\nmode = 'lora'\n")
    assert run(out, "--resume", "--set", "train.num_steps=2") == 2
    assert "another recipe: trained.unet.mode is 'lora' there, None here" in capsys.readouterr().err


def test_a_broken_recipe_of_a_run_is_one_line(tmp_path):
    (tmp_path / "recipe.toml").write_text("[train\n")
    with pytest.raises(UserError, match=r"--run-dir: cannot read .*recipe\.toml"):
        load_run_recipe(tmp_path / "recipe.toml")
