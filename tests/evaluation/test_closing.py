"""The last lines name what exists, and their Python runs."""

import ast

import pytest
import torch
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
    assert "No encoder was exported" in text
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
    assert f"encoder: {tmp_path / 'export'}" in text
    assert "text_encoder=encoder" in text


@pytest.mark.parametrize("name", ["plain", 'it\'s a "folder"'])
def test_the_code_for_a_full_encoder_loads_it(tmp_path, monkeypatch, name):
    export = tmp_path / name
    save_encoder(export / "text_encoder")
    lines = usage_lines(export, base_model='a/"one\'s model"')
    assert len(lines) == 3
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


def test_the_code_for_a_lora_is_diffusers(tmp_path):
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    lines = usage_lines(tmp_path, base_model="a/model")
    assert len(lines) == 3
    ast.parse("\n".join(lines))
    assert lines[-1] == f"pipeline.load_lora_weights({str(tmp_path)!r})"
    assert usage_lines(tmp_path / "none", base_model="a/model") == []
