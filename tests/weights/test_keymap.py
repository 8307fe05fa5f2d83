"""Names of weights: every format there and back."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from fastcraft.errors import UserError
from fastcraft.weights.keymap import (
    for_module,
    lora_from_diffusers,
    lora_from_kohya,
    lora_scale,
    lora_to_diffusers,
    lora_to_kohya,
    merge_lora,
    parameter_group,
    split_lora,
    to_flat,
    to_prefixed,
)

TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


@pytest.fixture
def lora_model(make_text_model):
    model = inject_adapter_in_model(LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS), make_text_model())
    for name, param in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param, std=0.1)
    return model


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def test_full_encoders_there_and_back(make_text_model):
    model = make_text_model()
    state = model.state_dict()
    prefixed = to_prefixed(state)
    assert "text_model.encoder.layers.1.mlp.fc2.bias" in prefixed
    assert all(name.startswith("text_model.") for name in prefixed)
    assert same(to_flat(prefixed), to_flat(state))
    assert same(to_prefixed(prefixed), prefixed)
    textcraftor = {f"module.{name}": tensor for name, tensor in prefixed.items()}
    textcraftor["module.text_model.embeddings.position_ids"] = torch.arange(77)
    assert same(to_flat(textcraftor), to_flat(state))
    assert same(for_module(textcraftor, model), dict(state))
    model.load_state_dict(for_module(textcraftor, model), strict=True)


def test_a_projection_stays_beside_the_text_model():
    state = {"text_projection.weight": torch.zeros(2, 2), "final_layer_norm.bias": torch.zeros(2)}
    assert to_prefixed(state).keys() == {"text_projection.weight", "text_model.final_layer_norm.bias"}
    assert to_flat(to_prefixed(state)).keys() == state.keys()


def test_old_module_trees_get_prefixed_names():
    class Old(nn.Module):
        def __init__(self):
            super().__init__()
            self.text_model = nn.ModuleDict({"final_layer_norm": nn.LayerNorm(2)})

    state = {"final_layer_norm.weight": torch.ones(2), "final_layer_norm.bias": torch.ones(2)}  # a new bias is 0
    old = Old()
    old.load_state_dict(for_module(state, old), strict=True)
    assert all(torch.equal(parameter, torch.ones(2)) for parameter in old.parameters())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # PEFT asks transformers by the old name
def test_lora_names_of_peft_in_both_its_forms(lora_model, make_text_model):
    base, lora = split_lora(lora_model.state_dict())
    assert same(base, make_text_model().state_dict() | {})
    assert len(lora) == 2 * 2 * len(TARGETS)
    assert lora["encoder.layers.0.self_attn.q_proj.lora_A.weight"].shape == (4, 32)
    saved = {f"base_model.model.text_model.{name}": tensor for name, tensor in lora.items()}
    assert same(split_lora(saved)[1], lora)
    wrapped = get_peft_model(make_text_model(), LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS))
    assert split_lora(wrapped.state_dict())[1].keys() == lora.keys()
    assert lora_scale(lora_model) == (4, 1.5)


def test_lora_variants_there_and_back(lora_model):
    _, lora = split_lora(lora_model.state_dict())
    diffusers = lora_to_diffusers(lora, scale=1.5)
    name = "encoder.layers.1.self_attn.out_proj"
    assert torch.equal(diffusers[f"text_encoder.text_model.{name}.lora_B.weight"], lora[f"{name}.lora_B.weight"] * 1.5)
    read = lora_from_diffusers(diffusers | {"unet.down_blocks.0.lora_A.weight": torch.zeros(1)})
    assert torch.equal(read[f"{name}.lora_A.weight"], lora[f"{name}.lora_A.weight"])
    assert read.keys() == lora.keys()
    kohya = lora_to_kohya(lora, alpha=6.0)
    assert float(kohya["lora_te_text_model_encoder_layers_1_self_attn_out_proj.alpha"]) == 6.0
    read, alpha = lora_from_kohya(kohya | {"lora_unet_x.alpha": torch.tensor(1.0)})
    assert alpha == 6.0
    assert same(read, lora)
    other = {name.replace("lora_te_", "lora_te1_"): tensor for name, tensor in kohya.items()}
    assert same(lora_from_kohya(other)[0], lora)


def test_merging_is_what_peft_does(lora_model, input_ids):
    expected = lora_model(input_ids).last_hidden_state
    base, lora = split_lora(lora_model.state_dict())
    merged = merge_lora(base, lora, scale=1.5)
    name = "encoder.layers.0.self_attn.q_proj"
    delta = lora_model.get_submodule(name).get_delta_weight("default")
    assert torch.allclose(merged[f"{name}.weight"] - base[f"{name}.weight"], delta, atol=1e-7)
    fresh = type(lora_model)(lora_model.config)
    fresh.load_state_dict(for_module(merged, fresh))
    assert torch.allclose(fresh(input_ids).last_hidden_state, expected, atol=1e-5)
    assert not torch.allclose(merged[f"{name}.weight"], base[f"{name}.weight"], atol=1e-3)


def test_what_cannot_be_mapped_is_refused(lora_model, make_text_model):
    _, lora = split_lora(lora_model.state_dict())
    with pytest.raises(UserError, match=r"q_proj\.lora_A\.weight is missing"):
        lora_to_kohya({"encoder.layers.0.self_attn.q_proj.lora_B.weight": torch.zeros(2, 2)}, alpha=1.0)
    with pytest.raises(UserError, match="no adapter weights"):
        lora_from_kohya({"unrelated": torch.zeros(1)})
    with pytest.raises(UserError, match="only plain adapters"):
        split_lora({"encoder.layers.0.self_attn.q_proj.lora_magnitude_vector.default.weight": torch.zeros(2)})
    kohya = lora_to_kohya(lora, alpha=6.0)
    kohya["lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha"] = torch.tensor(1.0)
    with pytest.raises(UserError, match="one alpha"):
        lora_from_kohya(kohya)
    with pytest.raises(UserError, match="no adapter"):
        lora_scale(make_text_model())


def test_parameter_groups():
    assert parameter_group("text_model.encoder.layers.11.mlp.fc1.weight") == "encoder.layers.11"
    assert parameter_group("encoder.layers.1.self_attn.q_proj.lora_A.default.weight") == "encoder.layers.1"
    assert parameter_group("embeddings.token_embedding.weight") == "embeddings"
    assert parameter_group("final_layer_norm.bias") == "final_layer_norm"
    assert parameter_group("model.text_model.final_layer_norm.bias") == "final_layer_norm"
    assert parameter_group("weight") == "weight"
    assert parameter_group("text.model.embeddings.token_embedding.weight") == "text.embeddings"
    assert parameter_group("text_2.model.final_layer_norm.bias") == "text_2.final_layer_norm"
    assert parameter_group("text.model.encoder.layers.3.mlp.fc1.lora_A.weight") == "text.encoder.layers.3"
    assert parameter_group("unet.conv_in.weight") == "unet.conv_in"
    assert parameter_group("unet.down_blocks.1.attentions.0.transformer_blocks.0.ff.x") == "unet.down_blocks.1"
