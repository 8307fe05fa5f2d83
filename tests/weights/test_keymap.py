"""Names of whole weights: every form there and back."""

import pytest
import torch
from torch import nn

from fastcraft.errors import UserError
from fastcraft.weights.keymap import for_module, parameter_group, part_names, to_flat, to_prefixed
from fastcraft.weights.verify import same


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


def test_a_unet_has_one_form(make_unet):
    unet = make_unet()
    assert same(for_module({f"module.{n}": x for n, x in unet.state_dict().items()}, unet), dict(unet.state_dict()))


def test_old_module_trees_get_prefixed_names():
    class Old(nn.Module):
        def __init__(self):
            super().__init__()
            self.text_model = nn.ModuleDict({"final_layer_norm": nn.LayerNorm(2)})

    state = {"final_layer_norm.weight": torch.ones(2), "final_layer_norm.bias": torch.ones(2)}  # a new bias is 0
    old = Old()
    old.load_state_dict(for_module(state, old), strict=True)
    assert all(torch.equal(parameter, torch.ones(2)) for parameter in old.parameters())


def test_unknown_parts_are_refused():
    assert part_names("text_2").folder == "text_encoder_2"
    with pytest.raises(UserError, match=r"part: must be one of text, text_2, unet, got 'vae'"):
        part_names("vae")


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
