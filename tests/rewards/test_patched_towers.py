"""A reward whose image tower runs on the fused ops: the same scores and gradients, and refusals with a reason."""

import pytest
import torch
from torch import nn

from fastcraft.diffusion.patch import Patch
from fastcraft.rewards import REWARDS, RewardSpec, build_rewards
from fastcraft.rewards.clip_tower import Towers
from fastcraft.rewards.open_clip import HEAD_WIDTHS
from fastcraft.rewards.tower import Tower

PROMPTS = ["a red cube", "two dogs. one cat"]
OPS = {  # head widths 16, 80 and 64; quick GELU, GELU and GELU
    "clip": {"layer_norm", "silu"},
    "hpsv2": {"layer_norm", "attention"},
    "imagereward": {"layer_norm", "attention"},
}


@pytest.fixture(scope="module")
def rewards(bundled, standins):
    """By name, in float64: differences are those of the formulas."""
    towers = Towers(device="cpu", dtype=torch.float64, bundled=bundled)
    return {name: REWARDS.get(name).build(standins[name][0], towers=towers) for name in OPS}


def run(reward):
    """Scores, gradient to the pictures, bytes kept for it."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 48, 40, generator=generator, dtype=torch.float64).requires_grad_()
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        scores = reward(images, PROMPTS)
    own = {parameter.untyped_storage().data_ptr() for parameter in reward.parameters()}
    num_bytes = sum(x.untyped_storage().nbytes() for place, x in kept.items() if place not in own)
    return scores.detach(), *torch.autograd.grad(scores.sum(), images), num_bytes


@pytest.mark.parametrize("name", OPS)
def test_scores_and_gradients_agree(name, rewards):
    reward = rewards[name]
    scores, gradient, num_bytes = run(reward)
    forwards = {path: module.__dict__.get("forward") for path, module in reward.named_modules()}
    with Patch(reward.tower.image_network, backend="reference") as patch:
        assert {swap.ops for swap in patch.swaps[0] if swap.ops} == OPS[name]
        embedding = reward.tower.image_network.embeddings.patch_embedding
        assert embedding.weight.is_contiguous()  # patches are not laid out channels-last
        assert "forward" not in embedding.__dict__
        patched = run(reward)
    assert gradient.abs().max() > 1e-4
    torch.testing.assert_close(patched[:2], (scores, gradient), rtol=1e-9, atol=1e-10)
    if name == "clip":  # what BLIP's attention keeps outweighs only at full size: tests/benchmarks
        assert patched[2] < num_bytes
    assert {path: module.__dict__.get("forward") for path, module in reward.named_modules()} == forwards
    assert all(torch.equal(a, b) for a, b in zip(run(reward)[:2], (scores, gradient), strict=True))


def reasons(network):
    return {swap.module: swap.reason for swap in Patch(network).swaps[0] if swap.reason}


def test_what_is_left_says_why(rewards):
    clip, hps = rewards["clip"].tower.model, rewards["hpsv2"].tower.model
    patches = "it embeds patches: 3 channels in, little to keep"
    width = "its head width is 16; the kernels know 40, 64, 80, 160"
    assert reasons(clip.vision_model) == {
        "embeddings.patch_embedding": patches,
        "encoder.layers.0.self_attn": width, "encoder.layers.1.self_attn": width,
    }  # fmt: skip
    assert reasons(hps.vision_model) == {"embeddings.patch_embedding": patches}
    text = reasons(hps.text_model)
    assert text["encoder.layers.0"] == text["encoder.layers.0.self_attn"] == "it reads text, under a mask"


def old_layer():
    """As transformers 4 calls it: with a second mask, answering with a tuple."""

    class CLIPEncoderLayer(nn.Module):
        def forward(self, hidden_states, attention_mask, causal_attention_mask, output_attentions=False):
            return (hidden_states,)

    CLIPEncoderLayer.__module__ = "transformers.models.clip.modeling_clip"
    return CLIPEncoderLayer()


@pytest.mark.parametrize(
    ("change", "module", "reason"),
    [
        (lambda layer: setattr(layer.self_attn, "dropout", 0.1), ".self_attn", "it has dropout 0.1"),
        (lambda layer: setattr(layer, "gradient_checkpointing", True), "", "transformers runs it again in backward"),
        (lambda layer: setattr(layer, "layer_norm2", nn.Identity()), "", "layer_norm1 and layer_norm2 must be plain"),
        (lambda layer: layer.layer_norm1.register_forward_hook(print), "", "its layer_norm1 has a hook"),
    ],
    ids=["dropout", "checkpointed", "norm", "hook"],
)
def test_guards_refuse_with_the_reason(change, module, reason, bundled, standins):
    towers = Towers(device="cpu", dtype=torch.float32, bundled=bundled)
    vision = REWARDS.get("hpsv2").build(standins["hpsv2"][0], towers=towers).tower.image_network
    change(vision.encoder.layers[0])
    assert reasons(vision)[f"encoder.layers.0{module}"].startswith(reason)


def test_layers_of_another_version_are_left():
    holder = nn.ModuleDict({"layer": old_layer()})
    assert reasons(holder) == {
        "layer": "its forward does not take (hidden_states, attention_mask, kwargs): another version of transformers"
    }


@pytest.mark.parametrize("name", ["hpsv2", "imagereward"])
def test_calls_that_a_patched_tower_cannot_serve(name, rewards):
    vision = rewards[name].tower.image_network
    layer, tokens = vision.encoder.layers[0], torch.zeros(1, 17, vision.config.hidden_size, dtype=torch.float64)
    with Patch(vision, backend="reference"):
        with pytest.raises(ValueError, match="output_attentions must be off in a patched image tower"):
            layer.self_attn(tokens, output_attentions=True)
        with pytest.raises(ValueError, match=r"attention_mask must be None .* got a tensor of shape \(1, 17\)"):
            layer(tokens, attention_mask=torch.ones(1, 17))


def test_a_mix_names_every_tower_once(bundled, standins):
    """Two rewards on one tower, and a held-out one on it too."""
    towers = Towers(device="cpu", dtype=torch.float32, bundled=bundled)
    mix, held_out = (
        build_rewards([RewardSpec(name, path=standins[name][0]) for name in names], towers=towers)
        for names in (("clip", "aesthetic", "brightness", "imagereward"), ("clip",))
    )
    assert [type(network).__name__ for network in mix.image_networks] == ["CLIPVisionModel", "BlipVisionModel"]
    assert Tower(source="a user's own").image_network is None
    patch = Patch(*mix.image_networks, *held_out.image_networks)
    assert [line.partition(":")[0] for line in patch.summary().splitlines()] == ["CLIPVisionModel", "BlipVisionModel"]
    with patch, pytest.raises(ValueError, match="on already"):
        patch.apply()


def test_info_shows_folders_and_files(bundled, standins, capsys, monkeypatch):
    from fastcraft.cli import main

    monkeypatch.setitem(HEAD_WIDTHS, 160, 80)
    expected = {str(bundled): "left: its head width is 16", standins["hpsv2"][0] + "/HPS_v2_compressed.pt": "attention"}
    expected[standins["imagereward"][0]] = "attention"
    for path, what in expected.items():
        assert main(["info", "--model", path]) == 0
        rows = dict(line.split(maxsplit=2)[::2] for line in capsys.readouterr().out.splitlines() if line[:2] == "  ")
        assert rows["reward.encoder.layers.0"] == "layer_norm"
        assert rows["reward.encoder.layers.0.self_attn"].startswith(what)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", OPS)
def test_on_a_gpu(name, bundled, standins):
    """The kernels in float32 against transformers' own modules."""
    reward = (
        REWARDS.get(name)
        .build(standins[name][0], towers=Towers(device="cuda", dtype=torch.float32, bundled=bundled))
        .to("cuda")
    )
    images = torch.rand(2, 3, 48, 40, generator=torch.Generator().manual_seed(0)).cuda().requires_grad_()

    def scored():
        scores = reward(images, PROMPTS)
        return scores.detach(), *torch.autograd.grad(scores.sum(), images)

    plain = scored()
    with Patch(reward.tower.image_network, backend="triton"):
        for ours, theirs in zip(scored(), plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3 * theirs.abs().max().item())
