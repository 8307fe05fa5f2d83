"""The trained copy, the frozen original, tokens and segments."""

import pytest
import torch

from fastcraft.text.encoder import split_encoders
from fastcraft.text.prompt_encoder import PromptEncoder
from fastcraft.text.tokenize import tokenize


def encoder(parts, trained, original, **kwargs):
    return PromptEncoder(
        parts.components.tokenizer, trained=trained, original=original, device=torch.device("cpu"),
        **{"guided": True, **kwargs},
    )  # fmt: skip


def test_tokens_are_those_of_the_stock_pipeline(tiny_parts, tiny_pipeline):
    from diffusers import StableDiffusionPipeline

    prompts = ["a red cat", "", "dog " * 100]
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    embeds, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
    tokens = tokenize(tiny_parts.components.tokenizer, prompts)
    assert tokens.input_ids.shape == (3, 1, 77)
    assert tokens.num_truncated == 1
    trained, _ = split_encoders(tiny_parts.components.text_encoder, train="full", dtype=torch.float32)
    torch.testing.assert_close(trained(tokens.input_ids), embeds)


def test_exactly_75_tokens_fit(tiny_parts):
    tokenizer = tiny_parts.components.tokenizer
    assert tokenize(tokenizer, ["cat " * 75]).num_truncated == 0
    assert tokenize(tokenizer, ["cat " * 76]).num_truncated == 1


def test_segments_are_joined(tiny_parts):
    trained, _ = split_encoders(tiny_parts.components.text_encoder, train="full", dtype=torch.float32)
    ids = tokenize(tiny_parts.components.tokenizer, ["a red cat", "a blue dog"]).input_ids
    both = trained(ids.reshape(1, 2, 77))
    torch.testing.assert_close(both, torch.cat([trained(ids[:1]), trained(ids[1:])], dim=1))


@pytest.mark.parametrize("train", ["full", "lora"])
def test_masters_are_float32_and_the_original_stays(tiny_parts, train):
    before = {n: p.clone() for n, p in tiny_parts.components.text_encoder.named_parameters()}
    trained, original = split_encoders(tiny_parts.components.text_encoder, train=train, dtype=torch.bfloat16)
    trainable = [p for p in trained.parameters() if p.requires_grad]
    assert trainable
    assert all(p.dtype == torch.float32 for p in trained.parameters())
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in original.parameters())
    with torch.no_grad():
        for parameter in trainable:
            parameter.add_(1)
    for name, parameter in original.model.named_parameters():
        assert torch.equal(parameter, before[name].bfloat16())


def test_lora_starts_as_the_original(tiny_parts):
    ids = tokenize(tiny_parts.components.tokenizer, ["a red cat"]).input_ids
    expected = tiny_parts.components.text_encoder(ids[0]).last_hidden_state
    trained, _ = split_encoders(tiny_parts.components.text_encoder, train="lora", dtype=torch.float32, lora_rank=4)
    torch.testing.assert_close(trained(ids), expected)
    shapes = {tuple(p.shape) for n, p in trained.named_parameters() if p.requires_grad}
    assert shapes == {(4, 32), (32, 4)}


def test_gradient_checkpointing_changes_no_gradient(tiny_parts, tiny_pipeline):
    from transformers import CLIPTextModel

    ids = tokenize(tiny_parts.components.tokenizer, ["a red cat"]).input_ids
    grads = []
    for checkpointing in (False, True):
        model = CLIPTextModel.from_pretrained(tiny_pipeline / "text_encoder", dtype=torch.float32)
        trained, _ = split_encoders(model, train="full", dtype=torch.float32, gradient_checkpointing=checkpointing)
        calls = []
        layer = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp"))
        layer.register_forward_pre_hook(lambda *args, calls=calls: calls.append(1))
        trained(ids).square().sum().backward()
        assert len(calls) == (2 if checkpointing else 1)
        grads.append([p.grad for p in trained.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("guided", [True, False])
def test_who_encodes_what(tiny_parts, guided):
    trained, original = split_encoders(tiny_parts.components.text_encoder, train="full", dtype=torch.float32)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.5)
    calls = []
    trained.register_forward_hook(lambda *args: calls.append(1))
    text = encoder(tiny_parts, trained, original, guided=guided)
    embeds = text.trained(["a red cat", "dog"])
    assert len(calls) == 1  # prompts and empty prompt in one forward: one backward through the encoder
    assert embeds.cond.requires_grad
    assert embeds.cond.shape == (2, 77, 32)
    assert (embeds.uncond is None) == (not guided)
    assert not text.original(["a red cat"]).cond.requires_grad
    assert not torch.allclose(text.original(["a red cat"]).cond, embeds.cond[:1])
    if guided:
        other = encoder(tiny_parts, trained, original, uncond_encoder="original").trained(["a red cat", "dog"])
        torch.testing.assert_close(other.cond, embeds.cond)
        torch.testing.assert_close(other.uncond, text.original(["dog"]).uncond)
        assert not torch.allclose(other.uncond, embeds.uncond)
