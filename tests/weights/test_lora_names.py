"""Names of LoRA weights in files: every format there and back, and what is refused."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from fastcraft.errors import UserError
from fastcraft.weights.ldm_names import ldm_names
from fastcraft.weights.lora_diffusers import from_diffusers, to_diffusers
from fastcraft.weights.lora_kohya import from_kohya, kohya_metadata, to_kohya
from fastcraft.weights.parts import part_weights
from fastcraft.weights.readers import read_weights
from fastcraft.weights.verify import same
from tests.diffusion.narrow_models import make_narrow

OUT = "encoder.layers.1.self_attn.out_proj"
TO_OUT = "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0"


def names_of(model):
    return [name for name, _ in model.named_modules()]


@pytest.fixture
def text(make_lora):
    model = make_lora(rank=4, alpha=6)
    return names_of(model), part_weights(model)


@pytest.fixture
def unet(make_unet_lora):
    model = make_unet_lora(rank=2, alpha=6)
    return names_of(model), part_weights(model)


def test_diffusers_there_and_back(text, unet):
    modules, own = text
    state = to_diffusers("text", own.lora, own.scaling)
    assert torch.equal(state[f"text_encoder.text_model.{OUT}.lora_B.weight"], own.lora[f"{OUT}.lora_B.weight"] * 1.5)
    unet_modules, unet_own = unet
    both = state | to_diffusers("unet", unet_own.lora, unet_own.scaling)
    both |= to_diffusers("text_2", own.lora, own.scaling)
    assert f"unet.{TO_OUT}.lora_A.weight" in both
    assert f"text_encoder_2.text_model.{OUT}.lora_A.weight" in both
    for part, names, weights in (("text", modules, own), ("text_2", modules, own), ("unet", unet_modules, unet_own)):
        lora, scaling = from_diffusers(both, part, names)
        scaled = {
            n: x * weights.scaling[n.rpartition(".lora_")[0]] if "_B." in n else x for n, x in weights.lora.items()
        }
        assert same(lora, scaled)
        assert set(scaling.values()) == {1.0}
    with pytest.raises(UserError, match="holds no LoRA of part 'unet', only of text"):
        from_diffusers(state, "unet", unet_modules)


def test_names_of_older_diffusers(text, unet):
    """As its attention processors saved them, with an alpha of its own here and there."""
    modules, own = text
    down, up = (own.lora[f"{OUT}.lora_{side}.weight"] for side in "AB")
    old = {
        f"text_encoder.text_model.{OUT}.lora_linear_layer.down.weight": down,
        f"text_encoder.text_model.{OUT}.lora_linear_layer.up.weight": up,
        "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight": down,
        "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.up.weight": up,
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.alpha": torch.tensor(2.0),
    }
    lora, scaling = from_diffusers(old, "text", modules)
    assert scaling == {OUT: 1.0, "encoder.layers.0.self_attn.q_proj": 0.5}
    assert torch.equal(lora[f"{OUT}.lora_B.weight"], up)
    processor = TO_OUT.removesuffix(".to_out.0") + ".processor.to_out_lora"
    old = {f"unet.{processor}.{side}.weight": x for side, x in (("down", torch.ones(2, 3)), ("up", torch.ones(3, 2)))}
    old |= {f"unet.{TO_OUT.replace('attn2', 'attn1')}.lora.{s}.weight": torch.ones(2, 2) for s in ("down", "up")}
    lora, _ = from_diffusers(old, "unet", unet[0])
    assert lora.keys() == {f"{n}.lora_{s}.weight" for n in (TO_OUT, TO_OUT.replace("attn2", "attn1")) for s in "AB"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"r": 4, "lora_alpha": 6}, 1.5),
        ({"lora_alpha": 6, "use_rslora": True}, 3.0),
        ({"lora_alpha": 6, "alpha_pattern": {"self_attn.out_proj": 2, "fc1": 8}}, 0.5),
        ({}, 1.0),
    ],
)
def test_alpha_by_the_settings_of_peft(settings, expected, text, tmp_path):
    """As newer diffusers note them in the file."""
    modules, own = text
    state = {f"text_encoder.text_model.{name}": tensor for name, tensor in own.lora.items()}
    assert from_diffusers(state, "text", modules, settings=settings)[1][OUT] == expected
    noted = {f"text_encoder.{name}": value for name, value in settings.items()} | {"unet.lora_alpha": 77}
    save_file(state, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(noted)})
    assert read_weights(tmp_path / "a.safetensors", "text", modules).scaling[OUT] == expected


def test_kohya_there_and_back(text, unet):
    modules, own = text
    unet_modules, unet_own = unet
    one = to_kohya("text", own.lora, own.scaling)
    assert float(one["lora_te_text_model_encoder_layers_1_self_attn_out_proj.alpha"]) == 6.0
    two = to_kohya("text", own.lora, own.scaling, two_encoders=True)
    assert {name.partition("_text_model")[0] for name in two} == {"lora_te1"}
    file = two | to_kohya("text_2", own.lora, own.scaling, two_encoders=True)
    file |= to_kohya("unet", unet_own.lora, unet_own.scaling, two_encoders=True)
    assert f"lora_unet_{TO_OUT.replace('.', '_')}.lora_up.weight" in file
    conv = file["lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight"]
    assert (conv.shape, file["lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight"].shape) == (
        (2, 32, 3, 3), (32, 2, 1, 1),
    )  # fmt: skip
    for state, part, names, weights in (
        (one, "text", modules, own), (file, "text", modules, own), (file, "text_2", modules, own),
        (file, "unet", unet_modules, unet_own),
    ):  # fmt: skip
        lora, scaling = from_kohya(state, part, names)
        assert same(lora, weights.lora)
        assert scaling == weights.scaling
    with pytest.raises(UserError, match="holds no LoRA of part 'unet', only of text"):
        from_kohya(one, "unet", unet_modules)


def test_alphas_of_kohya_differ_or_are_missing(text):
    modules, own = text
    state = to_kohya("text", own.lora, own.scaling)
    state["lora_te_text_model_encoder_layers_1_self_attn_out_proj.alpha"] = torch.tensor(1.0)
    del state["lora_te_text_model_encoder_layers_0_self_attn_out_proj.alpha"]
    scaling = from_kohya(state, "text", modules)[1]
    assert scaling[OUT] == 0.25
    assert scaling["encoder.layers.0.self_attn.out_proj"] == 1.0
    assert scaling["encoder.layers.0.self_attn.q_proj"] == 1.5


@pytest.mark.parametrize(
    ("mark", "kind"),
    [
        ("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr"), ("lora_mid.weight", "LoRA with a Tucker core"),
        ("dora_scale", "DoRA"),
        ("diff", "differences"), ("diff_b", "differences"), ("oft_blocks", "'lora_unet"),
    ],
)  # fmt: skip
def test_other_adapters_of_kohya_are_refused_by_name(mark, kind, text, unet):
    modules, own = text
    state = to_kohya("text", own.lora, own.scaling)
    other = {f"lora_unet_{TO_OUT.replace('.', '_')}.{mark}": torch.zeros(1)}
    assert from_kohya(state | other, "text", modules)[0].keys() == own.lora.keys()  # another part's affair
    with pytest.raises(UserError, match=rf"a\.safetensors: must be a plain LoRA adapter, got {kind}.*{mark}"):
        from_kohya(other, "unet", unet[0], source="a.safetensors")


def test_what_the_model_lacks_is_refused(text):
    modules, own = text
    short = [name for name in modules if "layers.1" not in name]
    with pytest.raises(UserError, match="no layer 'lora_te_text_model_encoder_layers_1"):
        from_kohya(to_kohya("text", own.lora, own.scaling), "text", short)
    with pytest.raises(UserError, match=r"no layer 'encoder\.layers\.1"):
        from_diffusers(to_diffusers("text", own.lora, own.scaling), "text", short)
    for settings, kind in (({"use_dora": True}, "DoRA"), ({"peft_type": "LOHA"}, "LOHA")):
        with pytest.raises(UserError, match=f"plain LoRA adapter, got {kind}"):
            from_diffusers(to_diffusers("text", own.lora, own.scaling), "text", modules, settings=settings)
    magnitude = {f"text_encoder.text_model.{OUT}.lora_magnitude_vector.weight": torch.zeros(2)}
    with pytest.raises(UserError, match=r"plain LoRA adapter, got .*magnitude"):
        from_diffusers(to_diffusers("text", own.lora, own.scaling) | magnitude, "text", modules)


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_names_of_stability_are_those_that_diffusers_reads(name):
    """Its own converter, given a checkpoint under our names, finds every weight of the UNet."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    unet = make_narrow(name).unet
    names = ldm_names(names_of(unet))
    state = unet.state_dict()
    checkpoint = {
        f"model.diffusion_model.{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": tensor
        for key, tensor in state.items()
    }
    assert len(checkpoint) == len(state)
    first = "output_blocks.1.2.conv" if name == "sdxl" else "output_blocks.1.1.conv"  # behind attention, or not
    assert names["up_blocks.0.upsamplers.0.conv"] == first
    config = dict(unet.config) | ({"class_embed_type": None} if name != "sdxl" else {})
    assert same(convert_ldm_unet_checkpoint(checkpoint, config), dict(state))


def test_kohya_with_names_of_stability(unet):
    modules, own = unet
    state = to_kohya("unet", own.lora, own.scaling)
    aliases = {
        f"lora_unet_{m.replace('.', '_')}": f"lora_unet_{n.replace('.', '_')}" for m, n in ldm_names(modules).items()
    }
    theirs = {
        f"{aliases[alias]}.{what}": x for (alias, _, what), x in ((k.partition("."), v) for k, v in state.items())
    }
    assert "lora_unet_middle_block_1_proj_in.alpha" in theirs
    lora, scaling = from_kohya(theirs, "unet", modules)
    assert same(lora, own.lora)
    assert scaling == own.scaling
    worthless = {name: torch.zeros_like(tensor) for name, tensor in theirs.items()}
    for both in (worthless | state, state | worthless):  # diffusers' names count
        assert same(from_kohya(both, "unet", modules)[0], own.lora)


def test_metadata_of_kohya():
    one = kohya_metadata([4, 4], [8.0, 8.0], base_model_version="sdxl_base_v1-0", title="t", resolution=1024)
    assert (one["ss_network_dim"], one["ss_network_alpha"]) == ("4", "8")
    assert one["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert one["modelspec.resolution"] == "1024x1024"
    many = kohya_metadata([4, 8], [math.sqrt(2), 1.0], base_model_version="sd_v1", title="t", resolution=512)
    assert (many["ss_network_dim"], many["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    with pytest.raises(UserError, match=r"base_model_version: must be one of sd_v1, .*, got 'flux'"):
        kohya_metadata([4], [4.0], base_model_version="flux", title="t", resolution=512)
