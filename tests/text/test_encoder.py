"""The trained copy, the frozen original, tokens and segments."""

from functools import partial

import pytest
import torch

from fastcraft.text.encoder import TextEncoder, recompute_layers
from fastcraft.text.prompt_encoder import PromptEncoder
from fastcraft.text.tokenize import tokenize
from fastcraft.trained.lora import TEXT_TARGETS, inject_lora
from fastcraft.trained.trained_set import TrainedPart, TrainedSet, frozen_copy


def text_set(model, *, mode="full", dtype=torch.float32, rank=16):
    """The encoder as the one part that is trained."""
    original = TextEncoder(frozen_copy(model, dtype)) if mode == "full" else None
    if mode == "lora":
        inject_lora(model, rank=rank, alpha=16.0, targets=TEXT_TARGETS)
    return TrainedSet([TrainedPart(name="text", module=TextEncoder(model), mode=mode, original=original)], dtype=dtype)


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
    torch.testing.assert_close(TextEncoder(tiny_parts.components.text_encoder)(tokens.input_ids), embeds)


def test_exactly_75_tokens_fit(tiny_parts):
    tokenizer = tiny_parts.components.tokenizer
    assert tokenize(tokenizer, ["cat " * 75]).num_truncated == 0
    assert tokenize(tokenizer, ["cat " * 76]).num_truncated == 1


def test_segments_are_joined(tiny_parts):
    trained = TextEncoder(tiny_parts.components.text_encoder)
    ids = tokenize(tiny_parts.components.tokenizer, ["a red cat", "a blue dog"]).input_ids
    both = trained(ids.reshape(1, 2, 77))
    torch.testing.assert_close(both, torch.cat([trained(ids[:1]), trained(ids[1:])], dim=1))


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_masters_are_float32_and_the_original_stays(tiny_parts, mode):
    model = tiny_parts.components.text_encoder
    before = {n: p.clone() for n, p in model.named_parameters()}
    ids = tokenize(tiny_parts.components.tokenizer, ["a red cat"]).input_ids
    trained = text_set(model, mode=mode, dtype=torch.bfloat16)
    trainable = [p for p in trained.text.parameters() if p.requires_grad]
    assert trainable
    assert all(p.dtype == torch.float32 for p in trained.text.parameters())
    expected = trained.original("text")(ids)
    with torch.no_grad():
        for parameter in trainable:
            parameter.add_(1)
    assert not torch.allclose(trained("text", ids).float(), expected.float())
    assert torch.equal(trained.original("text")(ids), expected)
    assert not trained.original("text")(ids).requires_grad
    if mode == "lora":
        base = {n.replace(".base.", "."): p for n, p in model.named_parameters() if "lora_" not in n}
        assert base.keys() == before.keys()
        assert all(torch.equal(parameter, before[name]) for name, parameter in base.items())
    else:
        original = trained.parts["text"].original
        assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in original.parameters())
        for name, parameter in original.model.named_parameters():
            assert torch.equal(parameter, before[name].bfloat16())


def test_lora_starts_as_the_original(tiny_parts):
    ids = tokenize(tiny_parts.components.tokenizer, ["a red cat"]).input_ids
    expected = tiny_parts.components.text_encoder(ids[0]).last_hidden_state
    trained = text_set(tiny_parts.components.text_encoder, mode="lora", rank=4)
    torch.testing.assert_close(trained("text", ids), expected)
    shapes = {tuple(p.shape) for n, p in trained.named_parameters() if p.requires_grad}
    assert shapes == {(4, 32), (32, 4)}


def test_gradient_checkpointing_changes_no_gradient(tiny_parts, tiny_pipeline):
    from transformers import CLIPTextModel

    ids = tokenize(tiny_parts.components.tokenizer, ["a red cat"]).input_ids
    grads = []
    for checkpointing in (False, True):
        model = CLIPTextModel.from_pretrained(tiny_pipeline / "text_encoder", dtype=torch.float32)
        if checkpointing:
            recompute_layers(model)
        trained = TextEncoder(model)
        calls = []
        layer = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp"))
        layer.register_forward_pre_hook(lambda *args, calls=calls: calls.append(1))
        trained(ids).square().sum().backward()
        assert len(calls) == (2 if checkpointing else 1)
        grads.append([p.grad for p in trained.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("guided", [True, False])
def test_who_encodes_what(tiny_parts, guided):
    parts = text_set(tiny_parts.components.text_encoder)
    trained, original = partial(parts, "text"), parts.original("text")
    with torch.no_grad():
        for parameter in parts.text.parameters():
            parameter.mul_(1.5)
    calls = []
    parts.text.register_forward_hook(lambda *args: calls.append(1))
    text = encoder(tiny_parts, trained, original, guided=guided)
    embeds = text.encode(["a red cat", "dog"], by="trained")
    assert len(calls) == 1  # prompts and empty prompt in one forward: one backward through the encoder
    assert embeds.cond.sequence.requires_grad
    assert embeds.cond.sequence.shape == (2, 77, 32)
    assert (embeds.uncond is None) == (not guided)
    by_original = text.encode(["a red cat", "dog"], by="original")
    assert len(calls) == 1
    assert not by_original.cond.sequence.requires_grad
    assert not torch.allclose(by_original.cond.sequence, embeds.cond.sequence)
    if guided:
        assert embeds.uncond.sequence.shape == (1, 77, 32)
        other = encoder(tiny_parts, trained, original, uncond_by="original").encode(["a red cat", "dog"], by="trained")
        torch.testing.assert_close(other.cond.sequence, embeds.cond.sequence)
        torch.testing.assert_close(other.uncond.sequence, by_original.uncond.sequence)
        assert not other.uncond.sequence.requires_grad
        assert not torch.allclose(other.uncond.sequence, embeds.uncond.sequence)
