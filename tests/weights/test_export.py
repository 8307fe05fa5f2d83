"""Exports of whole weights, loaded the way other programs load them."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fastcraft.diffusion.patch import Patch
from fastcraft.durable import write_tensors
from fastcraft.families.unet import use_text_kv
from fastcraft.trained.lora import UNET_TARGETS, inject_lora
from fastcraft.weights import export
from fastcraft.weights.export import ExportError, export_text_encoder, export_unet
from fastcraft.weights.verify import outputs, same
from tests.diffusion.narrow_models import make_narrow
from tests.weights.conftest import fill_b


@torch.no_grad()
def embed(model, input_ids):
    return model.eval()(input_ids).last_hidden_state


def picture(pipeline):
    return pipeline("a cat", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images


def test_full_encoder_reloads_bit_exactly(
    make_text_model, tokenizer_folder, tmp_path, input_ids, base_pipeline, load_pipeline
):
    trained = make_text_model(seed=5).train()
    report = export_text_encoder(trained, tokenizer_folder, tmp_path / "export", reference_ids=input_ids)
    assert report.exact
    assert "embeddings bit-exact" in str(report)
    assert trained.training
    folder = tmp_path / "export" / "text_encoder"
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(name.startswith("text_model.") for name in file.keys())  # noqa: SIM118
    written = (folder / "config.json").read_text()
    assert str(tmp_path) not in written
    assert json.loads(written)["architectures"] == ["CLIPTextModel"]
    reloaded = CLIPTextModel.from_pretrained(folder)
    assert torch.equal(embed(reloaded, input_ids), embed(trained, input_ids))
    pipeline = load_pipeline(base_pipeline, text_encoder=reloaded)
    assert torch.equal(embed(pipeline.text_encoder, input_ids), embed(trained, input_ids))
    assert abs(picture(pipeline) - picture(load_pipeline(base_pipeline))).max() > 0
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "export" / "tokenizer")
    assert tokenizer("a cat").input_ids == pipeline.tokenizer("a cat").input_ids
    assert len((tmp_path / "export" / "README.md").read_text().splitlines()) == 2
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == ["README.md", "text_encoder", "tokenizer"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_exports_say_how_far_they_are(dtype, make_text_model, tokenizer_folder, tmp_path, input_ids):
    trained = make_text_model(seed=5)
    report = export_text_encoder(trained, tokenizer_folder, tmp_path, reference_ids=input_ids, dtype=dtype)
    assert not report.exact
    reloaded = CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    assert reloaded.dtype == getattr(torch, dtype)
    distance = (embed(reloaded.float(), input_ids) - embed(trained, input_ids)).abs().max()
    assert float(distance) == pytest.approx(report.max_abs_error)
    assert 0 < report.max_abs_error < 0.1


@pytest.mark.parametrize("peft", [False, True], ids=["ours", "peft"])
def test_adapters_are_merged_into_a_full_export(peft, make_lora, tokenizer_folder, tmp_path, input_ids):
    trained = make_lora(peft=peft)
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    report = export_text_encoder(trained, tokenizer_folder, tmp_path, reference_ids=input_ids)
    reloaded = CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    assert torch.allclose(embed(reloaded, input_ids), embed(trained, input_ids), atol=1e-5)
    assert 0 < report.max_abs_error < 1e-5
    assert same(trained.state_dict(), before)


def test_a_second_encoder_keeps_its_projection(tokenizer_folder, tmp_path, input_ids):
    torch.manual_seed(3)
    config = CLIPTextConfig(
        vocab_size=516, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=24, bos_token_id=514, eos_token_id=515, pad_token_id=0,
    )  # fmt: skip
    trained = CLIPTextModelWithProjection(config)
    report = export_text_encoder(trained, tokenizer_folder, tmp_path, reference_ids=input_ids, part="text_2")
    assert report.exact
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "text_encoder_2", "tokenizer_2"}
    with safe_open(tmp_path / "text_encoder_2" / "model.safetensors", framework="pt") as file:
        assert "text_projection.weight" in file.keys()  # noqa: SIM118
        assert "text_model.final_layer_norm.bias" in file.keys()  # noqa: SIM118
    reloaded = CLIPTextModelWithProjection.from_pretrained(tmp_path / "text_encoder_2")
    assert len(outputs(trained, input_ids)) == 2
    assert all(
        torch.equal(*pair) for pair in zip(outputs(reloaded, input_ids), outputs(trained, input_ids), strict=True)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_unet_reloads(dtype, make_unet, unet_call, tmp_path, base_pipeline, load_pipeline):
    trained = make_unet(seed=5)
    trained.register_to_config(_name_or_path=str(tmp_path))
    report = export_unet(trained, tmp_path, reference_call=unet_call, dtype=dtype)
    assert report.exact == (dtype == "float32")
    assert "predictions" in str(report)
    assert report.num_tensors == len(trained.state_dict())
    written = json.loads((tmp_path / "unet" / "config.json").read_text())
    assert written["_class_name"] == "UNet2DConditionModel"
    assert str(tmp_path) not in json.dumps(written)
    reloaded = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert dict(reloaded.config).keys() >= {k for k in dict(trained.config) if not k.startswith("_")}
    assert same(
        reloaded.state_dict(), {n: x.to(getattr(torch, dtype)).float() for n, x in trained.state_dict().items()}
    )
    if dtype == "float32":
        expected = picture(load_pipeline(base_pipeline, unet=trained))
        assert abs(picture(load_pipeline(base_pipeline, unet=reloaded)) - expected).max() == 0
        assert abs(picture(load_pipeline(base_pipeline)) - expected).max() > 0


def test_a_config_may_be_given(make_unet, unet_call, tmp_path):
    trained = make_unet()
    export_unet(trained, tmp_path, reference_call=unet_call, config={**trained.config, "sample_size": 96})
    assert UNet2DConditionModel.from_pretrained(tmp_path / "unet").config.sample_size == 96


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_unet_in_use_is_exported_merged(name, tmp_path):
    """With adapters, in bfloat16, patched; SD1's also with its text projected once."""
    narrow = make_narrow(name)
    unet = nn.Module.to(narrow.unet, torch.bfloat16)
    inject_lora(unet, rank=2, alpha=4, targets=UNET_TARGETS)
    fill_b(unet)
    if name == "sd15":
        use_text_kv(unet)
    call = {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": 300,
        **narrow.arguments(torch.randn(1, 7, 24), torch.randn(1, 20)),
    }
    with Patch(unet, backend="reference"):
        processors = unet.attn_processors
        report = export_unet(unet, tmp_path, reference_call=call)
        assert unet.attn_processors == processors
    reloaded = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    expected = outputs(nn.Module.to(unet, torch.float32), call)[0]
    torch.testing.assert_close(outputs(reloaded, call)[0], expected, rtol=1e-3, atol=1e-4)
    assert 0 < report.max_abs_error < 0.5 * expected.abs().max()


def wrong(state, token):
    name = "text_model.embeddings.token_embedding.weight"
    return dict(state) | {name: state[name].index_fill(0, torch.tensor([token]), 0.0)}


def test_an_export_that_does_not_read_back_is_not_put_in_place(
    make_text_model, make_unet, unet_call, tokenizer_folder, tmp_path, input_ids, monkeypatch
):
    good = make_text_model()
    export_text_encoder(good, tokenizer_folder, tmp_path, reference_ids=input_ids)
    kept = (tmp_path / "text_encoder" / "model.safetensors").read_bytes()
    flawed = make_text_model(seed=5)
    flawed.final_layer_norm.register_forward_hook(lambda module, inputs, output: output * 1.001)  # not in any file
    with pytest.raises(ExportError, match="text_encoder: embeddings differ"):
        export_text_encoder(flawed, tokenizer_folder, tmp_path, reference_ids=input_ids)
    broken = make_text_model()
    nn.init.constant_(broken.final_layer_norm.weight, float("nan"))
    with pytest.raises(ExportError, match="not finite"):
        export_text_encoder(broken, tokenizer_folder, tmp_path, reference_ids=input_ids)
    with monkeypatch.context() as patch:  # a token that the reference does not have
        unseen = min(set(range(514)) - set(input_ids.flatten().tolist()))
        patch.setattr(
            export, "write_tensors", lambda path, state, **kw: write_tensors(path, wrong(state, unseen), **kw)
        )
        with pytest.raises(ExportError, match="text_encoder: the reloaded weights are not those"):
            export_text_encoder(good, tokenizer_folder, tmp_path, reference_ids=input_ids)
    unet = make_unet()
    unet.conv_out.register_forward_hook(lambda module, inputs, output: output * 1.001)
    with pytest.raises(ExportError, match="unet: predictions differ"):
        export_unet(unet, tmp_path, reference_call=unet_call)
    assert (tmp_path / "text_encoder" / "model.safetensors").read_bytes() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "text_encoder", "tokenizer"]


def test_exporting_again_replaces(make_text_model, tokenizer_folder, tmp_path, input_ids):
    for seed in (1, 2):
        trained = make_text_model(seed)
        export_text_encoder(trained, tokenizer_folder, tmp_path, reference_ids=input_ids)
    assert torch.equal(
        embed(CLIPTextModel.from_pretrained(tmp_path / "text_encoder"), input_ids), embed(trained, input_ids)
    )
