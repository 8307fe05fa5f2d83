"""The engine in one process, against plain torch."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastcraft.engine.schedule import lr_at
from fastcraft.engine.zero2 import init_distributed
from fastcraft.errors import UserError
from fastcraft.trained.lora import inject_lora

CONFIGS = ["zero2.json", "zero1.json", "zero2_offload.json", "zero2_fp32.json"]


def plain_run(model, batches, *, accumulation, max_grad_norm=1.0):
    """The same training in plain torch: weights and gradient norms."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.01)
    norms = []
    for update, start in enumerate(range(0, len(batches), accumulation)):
        optimizer.zero_grad()
        for batch in batches[start : start + accumulation]:
            (model(batch).last_hidden_state[..., :8].pow(2).mean() / accumulation).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or torch.inf)))
        for group in optimizer.param_groups:
            group["lr"] = lr_at(update, peak=1e-3, warmup_steps=2, total_steps=10, schedule="cosine")
        optimizer.step()
    return dict(model.named_parameters()), norms


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("config", CONFIGS)
def test_each_config_trains_as_plain_torch_does(
    config, accumulation, make_engine, make_text_model, micro_step, input_ids
):
    engine = make_engine(config, gradient_accumulation_steps=accumulation)
    results = []
    for number, batch in enumerate(input_ids.split(2), start=1):
        micro_step(engine, batch, of=accumulation, closes=number % accumulation == 0)
        results.append(engine.step())
    weights, norms = plain_run(make_text_model(), input_ids.split(2), accumulation=accumulation)
    due = results[accumulation - 1 :: accumulation]
    assert [result.took_step for result in results] == [(i + 1) % accumulation == 0 for i in range(4)]
    assert [result.grad_norm for result in due] == pytest.approx(norms, rel=1e-5)
    assert [result.lr for result in due[:2]] == [{"all": 5e-4}, {"all": 1e-3}]
    assert engine.num_updates == 4 // accumulation
    # Adam divides by tiny second moments: an attention key's bias has no gradient but rounding
    for name, param in engine.trainable_parameters().items():
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(param, weights[name], rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("config", ["zero2.json", "zero1.json", "zero2_offload.json"])
def test_each_mixed_config_trains_in_bf16_with_float32_masters(config, make_engine, micro_step, input_ids):
    engine = make_engine(config, dtype="bfloat16", learning_rate=1e-6)
    linear = engine.module.encoder.layers[0].mlp.fc1
    seen = []
    linear.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    before = engine.masters()
    micro_step(engine, input_ids[:2])
    norms = engine.group_gradient_norms()
    assert engine.step().took_step
    assert seen == [torch.bfloat16]
    assert set(norms) == {"embeddings", "encoder.layers.0", "encoder.layers.1", "final_layer_norm"}
    assert all(norm > 0 for norm in norms.values())
    changes = engine.group_changes(before)
    assert changes.keys() == norms.keys()
    assert all(0 < change < 2e-6 for change in changes.values()), "a bf16 master would not move by 1e-6, or jump"


def test_gradients_are_reduced_in_float32(make_engine):
    engine = make_engine(dtype="bfloat16")
    assert set(engine._zero.ipg_buckets) == {torch.float32}  # by default those of linear layers are sent as bf16


def test_clipping_off_is_zero(make_engine, micro_step, input_ids):
    engine = make_engine(max_grad_norm=0.0)
    micro_step(engine, input_ids[:2])
    gradients = engine.gradients()
    result = engine.step()
    total = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    assert result.grad_norm == pytest.approx(float(total), rel=1e-5)


def test_a_second_backward_is_refused(make_engine, micro_step, input_ids):
    engine = make_engine()
    micro_step(engine, input_ids[:2])
    with pytest.raises(RuntimeError, match="twice"):
        micro_step(engine, input_ids[2:4])
    engine.step()
    with pytest.raises(RuntimeError, match="backward before"):
        engine.step()
    with pytest.raises(RuntimeError, match="between"):
        engine.gradients()


@pytest.mark.parametrize("config", ["zero2.json", "zero1.json", "zero2_offload.json"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_that_is_not_finite_leaves_no_trace(config, accumulation, make_engine, input_ids, micro_step):
    engine, clean = (make_engine(config, gradient_accumulation_steps=accumulation) for _ in range(2))
    closes = [number == accumulation for number in range(1, accumulation + 1)]
    for batch, closing in zip(input_ids.split(2), closes, strict=False):
        engine.backward(engine(batch).last_hidden_state.mean() * float("nan"), closes_update=closing)
        result = engine.step()
    assert (result.took_step, result.skipped, result.grad_norm) == (False, True, None)
    for trained in (engine, clean):
        for batch, closing in zip(input_ids.split(2), closes, strict=False):
            micro_step(trained, batch, of=accumulation, closes=closing)
            result = trained.step()
        assert result.took_step
    assert engine.num_updates == clean.num_updates == 1
    assert_equal(engine.state(), clean.state())


@pytest.mark.parametrize("config", CONFIGS)
def test_training_goes_on_bit_exactly_from_a_state(config, make_engine, make_text_model, micro_step, input_ids):
    first = make_engine(config)
    for batch in input_ids.split(2)[:2]:
        micro_step(first, batch)
        first.step()
    state = {name: tensor.clone() for name, tensor in first.state().items()}
    second = make_engine(config, model=make_text_model(seed=1))
    second.load_state(state)
    assert_equal(second.state(), state)
    assert int(state["step"]) == 2
    for trained in (first, second):
        trained.losses = []
        for batch in input_ids.split(2)[2:]:
            trained.losses.append(micro_step(trained, batch).item())
            trained.result = trained.step()
    assert first.losses == second.losses
    assert first.result == second.result
    assert_equal(second.state(), first.state())


def test_a_state_of_another_model_is_refused(make_engine):
    engine = make_engine()
    state = engine.state()
    name = "exp_avg.final_layer_norm.weight"
    with pytest.raises(UserError, match=f"{name} is missing"):
        engine.load_state({key: tensor for key, tensor in state.items() if key != name})
    with pytest.raises(UserError, match=r"param\.other is unknown"):
        engine.load_state(state | {"param.other": torch.zeros(1)})
    with pytest.raises(UserError, match=r"must be \(32,\), got \(31,\)"):
        engine.load_state(state | {name: torch.zeros(31)})


def test_only_adapters_train_with_lora(make_engine, make_text_model, micro_step, input_ids):
    model = make_text_model()
    inject_lora(model, rank=2, alpha=4, targets=["q_proj"])
    frozen = {name: param.clone() for name, param in model.named_parameters() if "lora_" not in name}
    engine = make_engine(model=model)
    before = engine.masters()
    micro_step(engine, input_ids[:2])
    assert all(norm > 0 for norm in engine.group_gradient_norms().values())
    engine.step()
    assert set(engine.group_changes(before)) == {"encoder.layers.0", "encoder.layers.1"}
    assert min(engine.group_changes(before).values()) > 0
    assert all("lora_" in name for name in engine.state() if name != "step")
    for name, param in frozen.items():
        assert torch.equal(param, dict(model.named_parameters())[name]), name


def test_bad_input_is_a_clean_error(make_engine, make_text_model):
    with pytest.raises(UserError, match="nothing to train"):
        make_engine(model=make_text_model().requires_grad_(False))
    mixed = make_text_model()
    mixed.final_layer_norm.bfloat16()
    with pytest.raises(ValueError, match=r"must all be float32 or all bfloat16, got .*bfloat16.*float32"):
        make_engine(model=mixed)
    with pytest.raises(ValueError, match=r"must all be float32 or all bfloat16, got .*float16"):
        make_engine(model=make_text_model().half())


def test_deepspeeds_own_refusal_is_one_line(make_engine, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2, "overlap_com": true}}')
    with pytest.raises(UserError, match=r"--ds_config: overlap_com: .* got True"):
        make_engine(path)


def test_the_module_is_usable_after_close(make_engine, input_ids):
    engine = make_engine()
    model = copy.deepcopy(engine.module.state_dict())
    engine.close()
    with torch.no_grad():
        assert engine.module(input_ids).last_hidden_state.isfinite().all()
    assert_equal(engine.module.state_dict(), model)


def test_plain_python_needs_no_launcher_no_port_and_no_compiler(tmp_path, recipe):
    program = (
        "import torch\n"
        "from fastcraft.engine.agreement import barrier, close_distributed, rank, world_size\n"
        "from fastcraft.engine.ds_config import fill_ds_config, load_ds_config\n"
        "from fastcraft.engine.zero2 import Zero2Engine, init_distributed\n"
        f"RECIPE = {dict(recipe)!r}\n"
        "for _ in range(2):\n"  # a run, and another one in the same process
        "    opened = [init_distributed('cpu') for _ in range(2)]\n"
        "    module = torch.nn.Linear(2, 1)\n"
        "    config = fill_ds_config(load_ds_config('ds_configs/zero2.json'), **RECIPE)\n"
        "    engine = Zero2Engine(module, ds_config=config, device=torch.device('cpu'), total_steps=1, warmup_steps=0,"
        " lr_schedule='constant')\n"
        "    engine.backward(engine(torch.ones(1, 2)).sum())\n"
        "    barrier(); print(rank(), world_size(), opened, engine.step().took_step)\n"
        "    close_distributed()\n"
    )
    root = Path(__file__).parents[2]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(root), "TORCH_EXTENSIONS_DIR": str(tmp_path), "PATH": "/nowhere"}
    job = [sys.executable, "-c", program]
    done = subprocess.run(job, env=environment, cwd=root, capture_output=True, text=True, timeout=400)
    assert (done.returncode, done.stdout.splitlines()) == (0, ["0 1 [True, False] True"] * 2), done.stderr
    assert list(tmp_path.iterdir()) == []
    assert "INFO" not in done.stderr


def test_another_accelerator_is_refused(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(UserError, match="DS_ACCELERATOR"):
        init_distributed("cpu")


def assert_equal(state, other):
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, other[name]), name
