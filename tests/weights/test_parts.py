"""Weights and adapters of a live model, apart and together."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from fastcraft.errors import UserError
from fastcraft.trained.lora import TEXT_TARGETS, inject_lora
from fastcraft.weights.keymap import for_module
from fastcraft.weights.parts import (
    PartWeights,
    apply_weights,
    lora_modules,
    lora_scaling,
    merge_lora,
    part_weights,
    split_lora,
)
from fastcraft.weights.verify import outputs, same

Q = "encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("peft", [False, True], ids=["ours", "peft"])
def test_a_model_with_adapters_comes_apart(peft, make_lora, make_text_model):
    weights = part_weights(make_lora(rank=4, alpha=6, peft=peft))
    assert same(weights.whole, make_text_model().state_dict() | {})
    assert len(weights.lora) == 2 * 2 * len(TEXT_TARGETS)
    assert weights.lora[f"{Q}.lora_A.weight"].shape == (4, 32)
    assert lora_modules(weights.lora) == sorted(weights.scaling)
    assert set(weights.scaling.values()) == {1.5}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # PEFT asks transformers by the old name
def test_names_of_peft_in_all_their_forms(make_lora, make_text_model):
    lora = part_weights(make_lora()).lora
    saved = {f"base_model.model.text_model.{name}": tensor for name, tensor in lora.items()}
    assert same(split_lora(saved)[1], lora)
    wrapped = get_peft_model(make_text_model(), LoraConfig(r=4, lora_alpha=6, target_modules=list(TEXT_TARGETS)))
    assert part_weights(wrapped).lora.keys() == lora.keys()
    assert part_weights(wrapped).scaling.keys() == {name.rpartition(".lora_")[0] for name in lora}


def test_a_layer_that_is_called_base_keeps_its_name():
    model = nn.ModuleDict({"x": nn.ModuleDict({"base": nn.Linear(2, 2)}), "y": nn.Linear(2, 2)})
    inject_lora(model, rank=1, alpha=1, targets=["y"])
    assert part_weights(model).whole.keys() == {"x.base.weight", "x.base.bias", "y.weight", "y.bias"}


def test_only_plain_adapters(make_text_model, make_lora):
    assert part_weights(make_text_model()).lora is None
    with pytest.raises(UserError, match="only plain adapters"):
        split_lora({f"{Q}.lora_magnitude_vector.default.weight": torch.zeros(2)})
    two = make_lora(peft=True)
    with pytest.warns(UserWarning, match="multiple adapters"):
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), two, adapter_name="second")
    with pytest.raises(UserError, match=r"one adapter .* \['default', 'second'\]"):
        lora_scaling(two)
    lora = {f"{Q}.lora_A.weight": torch.zeros(4, 32), f"{Q}.lora_B.weight": torch.zeros(32, 2)}
    with pytest.raises(UserError, match=r"lora_A \(4, 32\) and lora_B \(32, 2\) do not fit"):
        lora_modules(lora)
    del lora[f"{Q}.lora_A.weight"]
    with pytest.raises(UserError, match=r"q_proj\.lora_A\.weight is missing"):
        lora_modules(lora)


def test_merging_is_what_peft_does(make_lora, input_ids):
    model = make_lora(rank=4, alpha=6, peft=True)
    weights = part_weights(model)
    merged = merge_lora(weights.whole, weights.lora, weights.scaling)
    delta = model.get_submodule(Q).get_delta_weight("default")
    assert torch.allclose(merged[f"{Q}.weight"] - weights.whole[f"{Q}.weight"], delta, atol=1e-7)
    assert not torch.allclose(merged[f"{Q}.weight"], weights.whole[f"{Q}.weight"], atol=1e-3)
    fresh = type(model)(model.config)
    fresh.load_state_dict(for_module(merged, fresh))
    assert torch.allclose(outputs(fresh, input_ids)[0], outputs(model, input_ids)[0], atol=1e-5)


def test_convolutions_merge_too(make_unet, make_unet_lora, unet_call):
    trained, fresh = make_unet_lora(), make_unet()
    weights = part_weights(trained)
    assert weights.lora["conv_out.lora_A.weight" if "conv_out" in weights.scaling else
                        "down_blocks.0.resnets.0.conv1.lora_A.weight"].dim() == 4  # fmt: skip
    before = outputs(fresh, unet_call)[0]
    apply_weights(fresh, PartWeights(lora=weights.lora, scaling=weights.scaling))
    expected = outputs(trained, unet_call)[0]
    torch.testing.assert_close(outputs(fresh, unet_call)[0], expected, rtol=1e-4, atol=1e-5)
    assert (before - expected).abs().max() > 0.01


def test_weights_and_adapters_together(make_lora, make_text_model, input_ids):
    trained, other = make_lora(), make_text_model(seed=5)
    apply_weights(other, part_weights(trained))  # the base and its adapters
    assert torch.allclose(outputs(other, input_ids)[0], outputs(trained, input_ids)[0], atol=1e-5)
    half = make_text_model(seed=5).bfloat16()
    apply_weights(half, part_weights(trained))
    assert torch.equal(half.get_parameter(f"{Q}.weight"), other.get_parameter(f"{Q}.weight").bfloat16())


def test_what_does_not_fit_changes_nothing(make_text_model, make_lora):
    model = make_text_model()
    before = copy.deepcopy(model.state_dict())
    good = part_weights(make_text_model(seed=5)).whole
    name = f"{Q}.weight"
    lora = part_weights(make_lora()).lora
    ones = dict.fromkeys(lora_modules(lora), 1.0)
    wide, other = (
        lora | {f"{Q}.lora_A.weight": torch.zeros(4, 48)},
        {f"x.lora_{s}.weight": torch.ones(1, 1) for s in "AB"},
    )
    for weights, message in (
        (PartWeights(whole={k: v for k, v in good.items() if k != name}, source="a"), rf"a: .*missing: {Q}"),
        (PartWeights(whole=good | {"extra": torch.zeros(1)}, source="a"), "a: .*unknown: extra"),
        (PartWeights(whole=good | {name: torch.zeros(32, 48)}, source="a"), r"shape \(32, 32\), got \(32, 48\)"),
        (
            PartWeights(whole=good, lora=wide, scaling=ones, source="b"),
            r"b: the adapter of .* \(32, 32\), got \(32, 48\)",
        ),
        (PartWeights(lora=other, scaling={"x": 1.0}, source="b"), "b: the model has no layer 'x'"),
    ):
        with pytest.raises(UserError, match=message):
            apply_weights(model, weights)
        assert same(model.state_dict(), before)
    inject_lora(model, rank=2, alpha=1, targets=TEXT_TARGETS)
    with pytest.raises(ValueError, match="has LoRA layers"):
        apply_weights(model, PartWeights(whole=good))
