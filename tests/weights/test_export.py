"""Exports, loaded the way other programs load them."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from fastcraft.errors import UserError
from fastcraft.weights import export
from fastcraft.weights.export import ExportError, export_lora, export_text_encoder

TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


@pytest.fixture
def make_lora(make_text_model):
    def make(rank=4, alpha=16):
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS)
        model = inject_adapter_in_model(config, make_text_model())
        for name, param in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(param, std=0.1)
        return model

    return make


@pytest.fixture
def base_pipeline(make_text_model, tokenizer_folder, tmp_path):
    """Folder of a Stable Diffusion pipeline made of tiny random parts."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=8,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=16,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=make_text_model(), tokenizer=CLIPTokenizer.from_pretrained(tokenizer_folder), unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load_pipeline(folder, **parts):
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def embed(model, input_ids):
    return model.eval()(input_ids).last_hidden_state


def test_full_encoder_reloads_bit_exactly(make_text_model, tokenizer_folder, tmp_path, input_ids, base_pipeline):
    trained = make_text_model(seed=5).train()
    report = export_text_encoder(trained, tokenizer_folder, tmp_path / "export", reference_ids=input_ids)
    assert report.exact
    assert "bit-exact" in str(report)
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
    image = pipeline(
        "a cat", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)
    ).images
    plain = load_pipeline(base_pipeline)("a cat", num_inference_steps=2, output_type="np",
                                         generator=torch.Generator().manual_seed(0)).images  # fmt: skip
    assert abs(image - plain).max() > 0
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "export" / "tokenizer")
    assert tokenizer("a cat").input_ids == pipeline.tokenizer("a cat").input_ids
    assert len((tmp_path / "export" / "README.md").read_text().splitlines()) == 3
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


@pytest.mark.parametrize(("rank", "alpha"), [(4, 16), (4, 6)])
def test_both_lora_variants_reload_in_diffusers(rank, alpha, make_lora, tmp_path, input_ids, base_pipeline):
    trained = make_lora(rank, alpha)
    reports = export_lora(trained, tmp_path, reference_ids=input_ids, title="test")
    assert [report.path.name for report in reports] == ["pytorch_lora_weights.safetensors", "kohya.safetensors"]
    expected = embed(trained, input_ids)
    for report in reports:
        pipeline = load_pipeline(base_pipeline)
        before = embed(pipeline.text_encoder, input_ids)
        kohya = report.path.name == "kohya.safetensors"  # the other one is what a reader takes without being told
        pipeline.load_lora_weights(report.path.parent, **({"weight_name": report.path.name} if kohya else {}))
        distance = (embed(pipeline.text_encoder, input_ids) - expected).abs().max()
        assert distance <= 2e-6 * expected.abs().max()
        if alpha / rank == 4:  # a power of two is multiplied into B without rounding
            assert distance == 0
            assert report.exact
        assert (before - expected).abs().max() > 0.1, "the adapters must matter"
    with safe_open(tmp_path / "lora" / "kohya.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == (str(rank), str(alpha))
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert str(tmp_path) not in json.dumps(metadata)


def test_adapters_are_merged_into_a_full_export(make_lora, tokenizer_folder, tmp_path, input_ids):
    trained = make_lora()
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    report = export_text_encoder(trained, tokenizer_folder, tmp_path, reference_ids=input_ids)
    reloaded = CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    assert torch.allclose(embed(reloaded, input_ids), embed(trained, input_ids), atol=1e-5)
    assert 0 <= report.max_abs_error < 1e-5
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())


def test_an_export_that_does_not_read_back_is_not_put_in_place(
    make_text_model, make_lora, tokenizer_folder, tmp_path, input_ids, monkeypatch
):
    good = make_text_model()
    export_text_encoder(good, tokenizer_folder, tmp_path, reference_ids=input_ids)
    kept = (tmp_path / "text_encoder" / "model.safetensors").read_bytes()
    flawed = make_text_model(seed=5)
    flawed.final_layer_norm.register_forward_hook(lambda module, inputs, output: output * 1.001)  # not in any file
    with pytest.raises(ExportError, match="embeddings differ"):
        export_text_encoder(flawed, tokenizer_folder, tmp_path, reference_ids=input_ids)
    broken = make_text_model()
    nn.init.constant_(broken.final_layer_norm.weight, float("nan"))
    with pytest.raises(ExportError, match="not finite"):
        export_text_encoder(broken, tokenizer_folder, tmp_path, reference_ids=input_ids)
    assert (tmp_path / "text_encoder" / "model.safetensors").read_bytes() == kept
    monkeypatch.setattr(export, "lora_to_diffusers", lambda lora, scale: without_alpha(lora))
    with pytest.raises(ExportError, match="pytorch_lora_weights"):
        export_lora(make_lora(), tmp_path, reference_ids=input_ids)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "text_encoder", "tokenizer"]


def without_alpha(lora):
    return {f"text_encoder.text_model.{name}": tensor for name, tensor in lora.items()}


def test_exporting_again_replaces(make_text_model, tokenizer_folder, tmp_path, input_ids):
    for seed in (1, 2):
        trained = make_text_model(seed)
        export_text_encoder(trained, tokenizer_folder, tmp_path, reference_ids=input_ids)
    assert torch.equal(
        embed(CLIPTextModel.from_pretrained(tmp_path / "text_encoder"), input_ids), embed(trained, input_ids)
    )


def test_a_model_without_adapters_has_no_lora(make_text_model, tmp_path, input_ids):
    with pytest.raises(UserError, match="no adapter"):
        export_lora(make_text_model(), tmp_path, reference_ids=input_ids)
