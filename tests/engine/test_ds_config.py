"""DeepSpeed's JSON is read strictly and never contradicts the recipe."""

import json
from pathlib import Path

import pytest

from fastcraft.engine.ds_config import fill_ds_config, load_ds_config
from fastcraft.errors import UserError

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ["not JSON"]),
        ("[]", ["object", "list"]),
        ('{"zero_optimization": {"stage": 2}, "zero_optimization": {"stage": 1}}', ["zero_optimization", "twice"]),
        ({"zero_optimizaton": {"stage": 2}}, ["zero_optimizaton", "did you mean 'zero_optimization'"]),
        ({"zero_optimization": {"stage": 3}}, ["stage", "1 or 2", "3"]),
        ({"zero_optimization": 2}, ["zero_optimization", "object"]),
        ({}, ["stage", "None"]),
        ({"bf16": {"enabled": True}}, ["bf16", "rounded", "torch_autocast"]),
        ({"fp16": {"enabled": True}}, ["fp16", "rounded"]),
        ({"scheduler": {}}, ["scheduler", "train.lr_schedule"]),
        ({"train_batch_size": 8}, ["train_batch_size"]),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, ["offload", "nvme"]),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 5}}, ["reduce_bucket_size", "even", "5"]),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Lamb"}}, ["AdamW", "Lamb"]),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"params": {"beta": 1}}}, ["params.beta", "'betas'"]),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"param": {}}}, ["optimizer.param", "'params'"]),
        ({"zero_optimization": {"stage": 2}, "torch_autocast": {"enable": True}}, ["autocast.enable", "'enabled'"]),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": [5]}}, ["reduce_bucket_size", "even", "[5]"]),
    ],
)
def test_a_bad_file_is_one_clear_line(write, content, words):
    with pytest.raises(UserError) as error:
        load_ds_config(write(content))
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in ["--ds_config", *words]), message


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--ds_config: cannot read .*none\.json"):
        load_ds_config(tmp_path / "none.json")


def test_auto_and_absent_values_come_from_the_recipe(write, recipe):
    bare = load_ds_config(write({"zero_optimization": {"stage": 2}}))
    full = load_ds_config(DS_CONFIGS / "zero2.json")
    for config in (bare, full):
        filled = fill_ds_config(config, **recipe | {"dtype": "bfloat16"})
        assert '"auto"' not in json.dumps(filled)
        assert filled["train_micro_batch_size_per_gpu"] == 2
        assert filled["gradient_clipping"] == 1.0
        assert filled["torch_autocast"]["enabled"] is True
        assert filled["torch_autocast"]["dtype"] == "bfloat16"
        params = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
        assert filled["optimizer"] == {"type": "AdamW", "params": params}
    assert '"auto"' in json.dumps(full), "the given config is left as it is"


@pytest.mark.parametrize(
    ("num_parameters", "largest", "bucket"),
    [(1001, 500, 1002), (123_000_000, 37_900_000, 50_000_000), (90_000_000, 60_000_001, 60_000_002)],
)
def test_buckets_are_sized_to_the_encoder(recipe, num_parameters, largest, bucket):
    recipe = recipe | {"num_parameters": num_parameters, "largest_parameter": largest}
    zero = fill_ds_config(load_ds_config(DS_CONFIGS / "zero2.json"), **recipe)["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == bucket


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train_micro_batch_size_per_gpu": 8}, ["train_micro_batch_size_per_gpu is 8", "train.batch_size is 2"]),
        ({"gradient_accumulation_steps": 4}, ["is 4", "train.gradient_accumulation_steps is 1"]),
        ({"gradient_clipping": 0.5}, ["gradient_clipping is 0.5", "train.max_grad_norm is 1.0"]),
        ({"torch_autocast": {"enabled": True}}, ["torch_autocast.enabled is True", "train.dtype is 'float32'"]),
        ({"optimizer": {"params": {"torch_adam": False}}}, ["optimizer.params.torch_adam must be true"]),
        ({"optimizer": {"params": {"lr": 0.1}}}, ["optimizer.params.lr is 0.1", "train.learning_rate is 0.001"]),
    ],
)
def test_a_contradiction_names_both_sides(write, recipe, change, words):
    config = load_ds_config(write({"zero_optimization": {"stage": 2}} | change))
    with pytest.raises(UserError) as error:
        fill_ds_config(config, **recipe)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_the_fp32_variant_demands_float32(recipe):
    config = load_ds_config(DS_CONFIGS / "zero2_fp32.json")
    assert fill_ds_config(config, **recipe)["torch_autocast"] == {"enabled": False}
    with pytest.raises(UserError, match=r"enabled is False but train\.dtype is 'bfloat16'"):
        fill_ds_config(config, **recipe | {"dtype": "bfloat16"})


def test_an_equal_value_is_no_contradiction(write, recipe):
    config = load_ds_config(write({"zero_optimization": {"stage": 1}, "gradient_clipping": 1}))
    assert fill_ds_config(config, **recipe)["gradient_clipping"] == 1.0
