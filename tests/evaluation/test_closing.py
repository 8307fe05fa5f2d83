"""The last lines name what exists, and their Python runs."""

import ast

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from fastcraft.evaluation.closing import closing_lines, usage_lines
from fastcraft.evaluation.images import save_samples


def save_encoder(folder):
    config = CLIPTextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    CLIPTextModel(config).save_pretrained(folder)


def test_only_what_exists_is_named(tmp_path):
    text = closing_lines(tmp_path, base_model="a/model")
    assert "report:" not in text
    assert "pipeline" not in text
    (tmp_path / "report.html").touch()
    (tmp_path / "tensorboard").mkdir()
    for step in (0, 100):
        save_samples(torch.zeros(1, 3, 8, 8), tmp_path, step=step, prompts=["a"])
    (tmp_path / "export").mkdir()
    save_encoder(tmp_path / "export" / "text_encoder")
    text = closing_lines(tmp_path, base_model="a/model")
    assert f"report:  {tmp_path / 'report.html'}" in text
    assert f"samples: {tmp_path / 'samples' / 'step-000100.png'}" in text
    assert f"tensorboard --logdir {tmp_path / 'tensorboard'}" in text
    assert f"export:  {tmp_path / 'export'}" in text
    assert "text_encoder=text_encoder" in text


@pytest.mark.parametrize("name", ["plain", 'it\'s a "folder"'])
def test_the_code_for_a_full_encoder_loads_it(tmp_path, monkeypatch, name):
    export = tmp_path / name
    save_encoder(export / "text_encoder")
    lines = usage_lines(export, base_model='a/"one\'s model"')
    seen = {}

    class Pipeline:
        @classmethod
        def from_pretrained(cls, base, **arguments):
            seen.update(arguments, base=base)

    monkeypatch.setattr("diffusers.StableDiffusionPipeline", Pipeline)
    exec(compile("\n".join(lines), "closing", "exec"), {})
    assert seen["base"] == 'a/"one\'s model"'
    assert isinstance(seen["text_encoder"], CLIPTextModel)
    assert seen["dtype"] == torch.float32


def save_adapters(export, *parts):
    (export / "lora").mkdir(parents=True, exist_ok=True)
    state = {f"{part}.layer.lora_A.weight": torch.zeros(1, 2) for part in parts}
    save_file(state, export / "lora" / "pytorch_lora_weights.safetensors")


def test_adapters_are_loaded_by_diffusers_in_place_of_a_merged_encoder(tmp_path):
    save_encoder(tmp_path / "text_encoder")
    save_adapters(tmp_path, "text_encoder", "unet")
    lines = usage_lines(tmp_path, base_model="a/model")
    ast.parse("\n".join(lines))
    assert lines[-1] == f"pipeline.load_lora_weights({str(tmp_path / 'lora')!r})"
    assert lines[-2] == "pipeline = StableDiffusionPipeline.from_pretrained('a/model')"
    assert usage_lines(tmp_path / "none", base_model="a/model") == []


def test_a_whole_encoder_and_adapters_of_the_unet_go_together(tmp_path):
    save_encoder(tmp_path / "text_encoder")
    save_adapters(tmp_path, "unet")
    lines = usage_lines(tmp_path, base_model="a/model")
    assert lines[-2].endswith("from_pretrained('a/model', text_encoder=text_encoder, dtype=text_encoder.dtype)")
    assert "load_lora_weights" in lines[-1]


def test_a_whole_unet_is_named_too(tmp_path):
    save_encoder(tmp_path / "text_encoder")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").touch()
    text = "\n".join(usage_lines(tmp_path, base_model="a/model"))
    assert f"unet = UNet2DConditionModel.from_pretrained({str(tmp_path / 'unet')!r})" in text
    assert "text_encoder=text_encoder, unet=unet" in text
