"""Two CPU ranks against one: gradients, checkpoints, agreement."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastcraft.engine.agreement import agree
from fastcraft.engine.checkpoint import find_checkpoint, load_checkpoint
from fastcraft.engine.schedule import lr_at

ROOT = Path(__file__).parents[2]


def run_two_ranks(folder: Path) -> None:
    """Run two_rank_job.py; a rank that fails or hangs shows its output."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
    }  # fmt: skip
    job = [sys.executable, str(Path(__file__).with_name("two_rank_job.py")), str(folder), str(ROOT / "ds_configs")]
    logs = [folder / f"log-{rank}.txt" for rank in range(2)]
    ranks = []
    for rank, log in enumerate(logs):
        with log.open("w") as output:
            ranks.append(
                subprocess.Popen(
                    job,
                    env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            for rank in ranks:
                rank.wait(timeout=600)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)


@pytest.fixture(scope="module")
def job(tmp_path_factory, make_text_model, input_ids, recipe):
    """Folder with the results of two_rank_job.py, which runs once."""
    folder = tmp_path_factory.mktemp("two_ranks")
    model = make_text_model()
    sizes = [param.numel() for param in model.parameters()]
    save_file({"input_ids": input_ids}, folder / "batch.safetensors")
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "weights.safetensors"
    )
    model.config.to_json_file(folder / "config.json")
    recipe = recipe | {"num_parameters": sum(sizes), "largest_parameter": max(sizes)}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    run_two_ranks(folder)
    return folder


@pytest.fixture(scope="module")
def results(job):
    return [json.loads((job / f"checks-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("run", "tolerance"),
    [
        ("zero2", 1e-6),
        ("zero2_accumulated", 1e-6),
        ("zero1_accumulated", 1e-6),
        ("zero2_bf16", 5e-2),
        ("zero2_again", 1e-6),
        ("parts", 1e-6),
        ("parts_bf16", 5e-2),
    ],
)
def test_two_ranks_have_the_gradient_of_the_joined_batch(run, tolerance, job, make_text_model, input_ids):
    model = make_text_model()
    model(input_ids).last_hidden_state[..., :8].pow(2).mean().backward()
    expected = {name: param.grad for name, param in model.named_parameters()}
    gradients = load_file(job / f"{run}.safetensors")
    assert gradients.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() <= tolerance * scale, name
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("run", ["parts", "parts_bf16"])
def test_masters_on_two_ranks_are_the_given_values(run, job):
    begun, given = load_file(job / f"{run}-begun.safetensors"), load_file(job / "weights.safetensors")
    assert {name for name in begun if name.startswith("param.")} == {f"param.{name}" for name in given}
    for name, tensor in given.items():
        assert begun[f"param.{name}"].dtype == torch.float32
        assert torch.equal(begun[f"param.{name}"], tensor), name
        if name.startswith("embeddings"):
            assert torch.equal(begun[f"ema.{name}"], tensor), name


def test_two_ranks_train_two_groups_as_plain_torch_does(job, make_text_model, input_ids):
    model = make_text_model()
    named = dict(model.named_parameters())
    groups = [[param for name, param in named.items() if name.startswith("embeddings") == first] for first in (1, 0)]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=0.0, weight_decay=0.01)
    for number in range(3):
        optimizer.zero_grad()
        model(input_ids).last_hidden_state[..., :8].pow(2).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group, peak in zip(optimizer.param_groups, (2e-3, 1e-3), strict=True):
            group["lr"] = lr_at(number, peak=peak, warmup_steps=2, total_steps=10, schedule="cosine")
        optimizer.step()
    trained, begun = (load_file(job / f"parts-{when}.safetensors") for when in ("trained", "begun"))
    for name, param in named.items():
        if not name.endswith("k_proj.bias"):  # no gradient but rounding, see test_zero2.py
            torch.testing.assert_close(trained[f"param.{name}"], param.detach(), rtol=1e-4, atol=2e-5, msg=name)
            assert not torch.equal(trained[f"param.{name}"], begun[f"param.{name}"])


def test_masters_of_bf16_weights_move_on_two_ranks_as_float32_ones(job):
    trained, wanted, begun = (
        load_file(job / f"{name}.safetensors") for name in ("parts_bf16-trained", "parts-trained", "parts-begun")
    )
    moved, expected = (
        torch.cat([(state[name] - begun[name]).flatten() for name in begun if name.startswith("param.")])
        for state in (trained, wanted)
    )
    assert torch.nn.functional.cosine_similarity(moved, expected, dim=0) > 0.9
    assert moved.norm() == pytest.approx(float(expected.norm()), rel=0.05)


def test_averages_on_two_ranks_are_those_of_the_whole_weights(results):
    for checks in results:
        for run in ("parts", "parts_bf16"):
            assert checks[f"{run}_average"] < 1e-6
            assert checks[f"{run}_swapped"] == [True, True, True]


def test_losses_continue_to_the_last_bit_at_the_same_world_size(results):
    for checks in results:
        assert checks["continues"]
        assert checks["same_state"]


def test_two_ranks_go_on_as_one(job, make_engine, micro_step, input_ids):
    checkpoint = load_checkpoint(find_checkpoint(job / "checkpoints")[0], rank=0, world_size=1)
    assert checkpoint.rank_tensors is None
    assert checkpoint.world_size == 2
    assert checkpoint.state == {"next_prompt": 16}
    engine = make_engine(batch_size=8)
    engine.load_state(checkpoint.tensors)
    state = engine.state()
    assert state.keys() == checkpoint.tensors.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in checkpoint.tensors.items())
    assert engine.num_updates == 2
    micro_step(engine, input_ids)
    assert engine.step().took_step


def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(results):
    assert [checks["nan_on_rank_1"] for checks in results] == [True, True]


def test_a_rank_without_memory_makes_all_leave_backward_and_begin_again(results):
    ran_out = "CUDA out of memory. Tried to allocate 20.00 MiB"
    assert [checks["out_of_memory"] for checks in results] == [["on another rank", "done"], [ran_out, "done"]]
    assert all(checks["stepped"] for checks in results)


def test_every_rank_hears_a_flag_of_any(results):
    assert [checks["agree"] for checks in results] == [[True, True, False]] * 2
    assert agree([True, False]) == [True, False]


def test_a_rank_that_cannot_write_fails_the_save_of_all(results):
    for checks in results:
        assert "step 3 failed" in checks["failed_together"]
        assert checks["left"] == ["step-000002"]
