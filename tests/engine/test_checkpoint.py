"""Checkpoints that survive kills and damage, and never start afresh in silence."""

import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastcraft.durable import retired
from fastcraft.engine.checkpoint import (
    CheckpointError,
    find_checkpoint,
    load_checkpoint,
    restore_rng,
    rng_tensors,
    save_checkpoint,
    sweep_checkpoints,
)
from fastcraft.errors import UserError

ROOT = Path(__file__).parents[2]


def save(directory, step, *, value=None, keep=10, size=100):
    value = float(step if value is None else value)
    tensors = {"param.w": torch.full((size,), value), "exp_avg.w": torch.zeros(size), "step": torch.tensor(step)}
    return save_checkpoint(
        directory, step, tensors=tensors, rank_tensors=rng_tensors(), state={"next_prompt": step * 8}, keep=keep
    )


def test_round_trip(tmp_path):
    path = save(tmp_path / "checkpoints", 7)
    assert path == tmp_path / "checkpoints" / "step-000007"
    assert sorted(file.name for file in path.iterdir()) == [
        "manifest.json", "model.safetensors", "optimizer.safetensors", "rank-0000.safetensors", "state.json",
    ]  # fmt: skip
    found, skipped = find_checkpoint(path.parent)
    assert (found, skipped) == (path, [])
    checkpoint = load_checkpoint(found, rank=0, world_size=1)
    assert (checkpoint.step, checkpoint.world_size, checkpoint.state) == (7, 1, {"next_prompt": 56})
    assert checkpoint.tensors.keys() == {"param.w", "exp_avg.w", "step"}
    assert torch.equal(checkpoint.tensors["param.w"], torch.full((100,), 7.0))
    assert checkpoint.rank_tensors.keys() == rng_tensors().keys()
    assert load_checkpoint(found, rank=1, world_size=2).rank_tensors is None


def test_random_numbers_continue(tmp_path):
    random.gauss(0, 1), np.random.standard_normal()  # leave a cached second value in both
    path = save(tmp_path, 1)
    wanted = draw()
    draw()
    restore_rng(load_checkpoint(path, rank=0, world_size=1).rank_tensors)
    assert draw() == wanted


def draw():
    return [torch.rand(3).tolist(), np.random.standard_normal(3).tolist(), random.gauss(0, 1), random.random()]


def test_only_the_newest_are_kept(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-000020", "step-000030"]
    save(tmp_path, 15, keep=1)  # after going back: what is newer is not this branch's to delete, this one stays
    assert names(tmp_path) == ["step-000015", "step-000020", "step-000030"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5, value=1)
    save(tmp_path, 5, value=2)
    assert names(tmp_path) == ["step-000005"]
    tensors = load_checkpoint(tmp_path / "step-000005", rank=0, world_size=1).tensors
    assert float(tensors["param.w"][0]) == 2.0


def test_a_failed_save_leaves_the_old_ones(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # as on a full disk: a write fails midway
    try:
        for step in (2, 3):
            with pytest.raises(CheckpointError, match=f"step {step} failed"):
                save(tmp_path, step, size=100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step-000001", "step-000002"]
    assert find_checkpoint(tmp_path)[0].name == "step-000002"
    save(tmp_path, 3, size=100_000)
    assert find_checkpoint(tmp_path)[0].name == "step-000003"


def test_state_must_be_json(tmp_path):
    for bad in (float("nan"), object()):
        with pytest.raises((ValueError, TypeError)):
            save_checkpoint(tmp_path, 1, tensors={}, rank_tensors={}, state={"loss": bad}, keep=1)
    with pytest.raises(UserError, match="there is none"):
        find_checkpoint(tmp_path)


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-2]),
    "missing": lambda file: file.unlink(),
    "flipped": flip_a_bit,
    "zero": lambda file: file.write_bytes(b""),
}


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "rank-0000.safetensors", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_named_and_skipped(tmp_path, name, damage):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    DAMAGES[damage](newest / name)
    found, skipped = find_checkpoint(tmp_path)
    assert found.name == "step-000001"
    assert [path for path, _ in skipped] == [newest]
    assert name in skipped[0][1]
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        load_checkpoint(newest, rank=0, world_size=1)


@pytest.mark.parametrize(
    "manifest",
    [{}, [], {"format": 99}, {"format": 1}, {"format": 1, "step": 2, "world_size": 1, "files": {}},
     {"format": 1, "step": 2, "world_size": 1, "files": {"../../secret": {"bytes": 0, "sha256": ""}}},
     {"format": 1, "step": 2, "world_size": "1", "files": {}}],
)  # fmt: skip
def test_a_manifest_that_promises_little_is_none(tmp_path, manifest):
    path = save(tmp_path, 2)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"step-000002: manifest\.json"):
        find_checkpoint(tmp_path)


def test_a_renamed_checkpoint_is_not_another_step(tmp_path):
    save(tmp_path, 2).rename(tmp_path / "step-000009")
    with pytest.raises(UserError, match="another step"):
        find_checkpoint(tmp_path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["FASTCRAFT_TEST_BOMB"],)


def test_a_pickle_is_never_executed(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCRAFT_TEST_BOMB", str(tmp_path / "exploded"))
    checkpoints = tmp_path / "checkpoints"
    for step, name in enumerate(("model.safetensors", "rank-0000.safetensors", "state.json"), start=1):
        path = save(checkpoints, step)
        payload = pickle.dumps(Bomb())
        (path / name).write_bytes(payload)
        (path / "extra.pt").write_bytes(payload)
        manifest = json.loads((path / "manifest.json").read_text())
        digest = subprocess.run(["sha256sum", path / name], capture_output=True, text=True, check=True).stdout.split()[
            0
        ]
        manifest["files"][name] = {"bytes": len(payload), "sha256": digest}
        (path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match="cannot be used"):
            load_checkpoint(find_checkpoint(checkpoints)[0], rank=0, world_size=1)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(payload)  # the payload does work
    assert (tmp_path / "exploded").exists()


def test_none_valid_is_an_error_that_lists_the_reasons(tmp_path):
    with pytest.raises(UserError, match=r"--resume: no usable checkpoint in .*nowhere"):
        find_checkpoint(tmp_path / "nowhere")
    for step in (1, 2):
        flip_a_bit(save(tmp_path, step) / "model.safetensors")
    with pytest.raises(UserError) as error:
        find_checkpoint(tmp_path)
    assert "\n" not in str(error.value)
    assert all(f"step-00000{step}: model.safetensors: its SHA-256" in str(error.value) for step in (1, 2))


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    path = save(tmp_path, 4, value=1)
    shutil.copytree(path, tmp_path / ".step-000004.tmp")
    path.rename(retired(path))
    found, _ = find_checkpoint(tmp_path)
    assert float(load_checkpoint(found, rank=0, world_size=1).tensors["param.w"][0]) == 1.0
    sweep_checkpoints(tmp_path)
    assert names(tmp_path) == ["step-000004"]
    assert find_checkpoint(tmp_path)[0] == path


def test_kill_at_any_moment_of_a_save_loses_at_most_one_interval(tmp_path):
    job = [sys.executable, str(Path(__file__).with_name("saving_job.py")), str(tmp_path / "checkpoints"), "40"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(job, env=environment, capture_output=True, text=True, timeout=400)
    lines = done.stdout.splitlines()
    assert (done.returncode, len(lines)) == (0, 40), done.stderr
    assert [line for line in lines if not line.startswith("good")] == []
    assert sum(".tmp" in line for line in lines) >= 10, "the kills must fall into saves"


def names(directory):
    return sorted(path.name for path in directory.iterdir())
