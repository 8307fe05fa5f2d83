"""Adapters of several parts in one file, loaded by stock diffusers."""

import copy
import json

import pytest
import torch
from safetensors import safe_open

from fastcraft.errors import UserError
from fastcraft.trained.lora import UNET_CONV_TARGETS, UNET_TARGETS, inject_lora
from fastcraft.weights import export_lora as module
from fastcraft.weights.export import ExportError, export_lora
from fastcraft.weights.lora_kohya import to_kohya
from fastcraft.weights.verify import outputs, same
from tests.diffusion.narrow_models import make_narrow
from tests.weights.conftest import fill_b

FILES = ["pytorch_lora_weights.safetensors", "kohya.safetensors"]


def picture(pipeline):
    return pipeline("a cat", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images


def load(pipeline, report):
    """``pytorch_lora_weights.safetensors`` is what a reader takes of a folder without being told."""
    name = {"weight_name": report.path.name} if "kohya" in report.path.name else {}
    pipeline.load_lora_weights(report.path.parent, **name)


@pytest.mark.parametrize("peft", [False, True], ids=["ours", "peft"])
@pytest.mark.parametrize(("rank", "alpha"), [(4, 16), (4, 6)])
def test_an_encoder_alone(rank, alpha, peft, make_lora, tmp_path, input_ids, base_pipeline, load_pipeline):
    trained = make_lora(rank, alpha, peft=peft)
    reports = export_lora(trained, tmp_path, reference_ids=input_ids, title="test")
    assert [report.path.name for report in reports] == FILES
    expected = outputs(trained, input_ids)[0]
    for report in reports:
        assert report.max_abs_error < 1e-5
        pipeline = load_pipeline(base_pipeline)
        before = outputs(pipeline.text_encoder, input_ids)[0]
        load(pipeline, report)
        distance = (outputs(pipeline.text_encoder, input_ids)[0] - expected).abs().max()
        assert distance <= 2e-6 * expected.abs().max()
        if alpha / rank == 4:  # a power of two is multiplied into B without rounding
            assert distance == 0
        assert (before - expected).abs().max() > 0.1, "the adapters must matter"
    with safe_open(tmp_path / "lora" / "kohya.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == (str(rank), str(alpha))
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert str(tmp_path) not in json.dumps(metadata)
    assert len((tmp_path / "README.md").read_text().splitlines()) == 2


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", [UNET_TARGETS, UNET_CONV_TARGETS], ids=["attention", "conv"])
def test_text_and_unet_in_one_file(
    targets, rslora, make_lora, make_unet, tmp_path, input_ids, unet_call, base_pipeline, load_pipeline
):
    """Stock diffusers computes what our layers compute: embeddings, predictions and pictures."""
    text, unet = make_lora(4, 6, rslora=rslora), make_unet()
    inject_lora(unet, rank=2, alpha=8, targets=targets)
    fill_b(unet)
    before = [copy.deepcopy(part.state_dict()) for part in (text, unet)]
    reports = export_lora(
        {"text": text, "unet": unet}, tmp_path, reference_ids=input_ids, reference_call=unet_call, resolution=64
    )
    assert all(same(part.state_dict(), state) for part, state in zip((text, unet), before, strict=True))
    expected = [*outputs(text, input_ids), *outputs(unet, unet_call)]
    ours = picture(load_pipeline(base_pipeline, text_encoder=text, unet=unet))
    assert abs(ours - picture(load_pipeline(base_pipeline))).max() > 0.005
    for report in reports:
        assert "embeddings and predictions within" in str(report)
        pipeline = load_pipeline(base_pipeline)
        load(pipeline, report)
        found = [*outputs(pipeline.text_encoder, input_ids), *outputs(pipeline.unet, unet_call)]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert abs(picture(pipeline) - ours).max() < 1e-5
    with safe_open(tmp_path / "lora" / "kohya.safetensors", framework="pt") as file:
        assert file.metadata()["ss_network_dim"] == "Dynamic"
        assert {name.partition("_")[2].partition("_")[0] for name in file.keys()} == {"te", "unet"}  # noqa: SIM118


def test_an_xl_has_two_encoders(make_lora, input_ids, tmp_path):
    narrow = make_narrow("sdxl")
    inject_lora(narrow.unet, rank=2, alpha=2, targets=UNET_TARGETS)
    fill_b(narrow.unet)
    call = {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": 300,
        **narrow.arguments(torch.randn(1, 7, 24), torch.randn(1, 20)),
    }
    parts = {"text": make_lora(), "text_2": make_lora(2, 2), "unet": narrow.unet}
    export_lora(parts, tmp_path, reference_ids=input_ids, reference_call=call)
    with safe_open(tmp_path / "lora" / "kohya.safetensors", framework="pt") as file:
        assert file.metadata()["ss_base_model_version"] == "sdxl_base_v1-0"
        assert {"_".join(name.split("_")[:2]) for name in file.keys()} == {"lora_te1", "lora_te2", "lora_unet"}  # noqa: SIM118
    export_lora({"text": make_lora()}, tmp_path, reference_ids=input_ids, base_model_version="sdxl_base_v1-0")
    with safe_open(tmp_path / "lora" / "kohya.safetensors", framework="pt") as file:
        assert {name.split("_")[1] for name in file.keys()} == {"te1"}  # noqa: SIM118


def test_what_does_not_read_back_is_not_put_in_place(make_lora, tmp_path, input_ids, monkeypatch):
    export_lora(make_lora(), tmp_path, reference_ids=input_ids)
    kept = (tmp_path / "lora" / FILES[0]).read_bytes()
    flaws = {
        "to_diffusers": lambda part, lora, scaling: {f"text_encoder.text_model.{n}": x for n, x in lora.items()},
        "to_kohya": lambda part, lora, scaling, two_encoders: {"lora_te_x.alpha": torch.ones(())},
    }
    for function, flawed in flaws.items():
        with monkeypatch.context() as patch:
            patch.setattr(module, function, flawed)
            with pytest.raises(ExportError, match=r"lora/(pytorch_lora|kohya).*\.safetensors: "):
                export_lora(make_lora(2, 4), tmp_path, reference_ids=input_ids)
    with monkeypatch.context() as patch:  # as much as rounding, and so only seen in the weights themselves
        patch.setattr(
            module, "to_kohya", lambda *args, **kw: {n: x * (1 + 3e-7) for n, x in to_kohya(*args, **kw).items()}
        )
        with pytest.raises(ExportError, match="adapters of 'text' are not those that were trained"):
            export_lora(make_lora(2, 4), tmp_path, reference_ids=input_ids)
    hooked = make_lora(2, 4)
    hooked.final_layer_norm.register_forward_hook(lambda module, inputs, output: output * 1.001)  # not in any file
    with pytest.raises(ExportError, match="embeddings differ by"):
        export_lora(hooked, tmp_path, reference_ids=input_ids)
    assert (tmp_path / "lora" / FILES[0]).read_bytes() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "lora"]


def test_what_is_missing_is_said(make_text_model, make_lora, make_unet_lora, tmp_path, input_ids):
    with pytest.raises(UserError, match="no adapter"):
        export_lora(make_text_model(), tmp_path, reference_ids=input_ids)
    with pytest.raises(ValueError, match="reference_call is needed for 'unet'"):
        export_lora({"text": make_lora(), "unet": make_unet_lora()}, tmp_path, reference_ids=input_ids)
    with pytest.raises(ValueError, match="no parts"):
        export_lora({}, tmp_path)
    with pytest.raises(UserError, match="part: must be one of text, text_2, unet, got 'vae'"):
        export_lora({"vae": make_unet_lora()}, tmp_path, reference_ids=input_ids)
    assert list(tmp_path.iterdir()) == []
