"""Our LoRA layer: PEFT's numbers, fewer bytes, and a switch that leaves nothing behind."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from fastcraft.diffusion.patch import Patch
from fastcraft.families.unet import use_text_kv
from fastcraft.trained import lora
from fastcraft.trained.lora import TEXT_TARGETS, LoRALayer, adapters_off, inject_lora
from tests.diffusion.narrow_models import make_narrow
from tests.diffusion.texts import condition


def adapters(model):
    """Trained parameters, by names without PEFT's ``default``."""
    return {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}


def fill_b(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapters(model).items():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def with_peft(model, *, rank, alpha, targets=TEXT_TARGETS, rslora=False):
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian", use_rslora=rslora
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(config, model.requires_grad_(False))
    return model


def small_unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize(("alpha", "rslora"), [(4, False), (6, False), (6, True)])
def test_adapters_outputs_and_gradients_are_those_of_peft(make_text_model, input_ids, alpha, rslora, autocast):
    results = []
    for ours in (True, False):
        model = make_text_model()
        torch.manual_seed(7)
        if ours:
            inject_lora(model, rank=4, alpha=alpha, targets=TEXT_TARGETS, rslora=rslora)
        else:
            with_peft(model, rank=4, alpha=alpha, rslora=rslora)
        drawn = torch.rand(1)  # both leave the generator in the same state
        start = {name: p.detach().clone() for name, p in adapters(model).items()}
        fill_b(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = model(input_ids[:2]).last_hidden_state
        hidden.float().square().sum().backward()
        results.append((start, {name: p.grad for name, p in adapters(model).items()}, hidden.detach(), drawn))
    (start, grads, hidden, drawn), (peft_start, peft_grads, peft_hidden, peft_drawn) = results
    assert torch.equal(drawn, peft_drawn)
    assert start.keys() == peft_start.keys()
    assert len(start) == 16
    assert all(torch.equal(start[name], peft_start[name]) for name in start)
    assert torch.equal(hidden, peft_hidden)
    assert all(torch.equal(grads[name], peft_grads[name]) for name in grads)
    assert all(p.abs().max() > 0 for p in grads.values())


def test_convolutions_are_those_of_peft():
    ours, peft = small_unet(), small_unet()
    targets = lora.UNET_CONV_TARGETS
    torch.manual_seed(7)
    names = inject_lora(ours, rank=4, alpha=4, targets=targets)
    torch.manual_seed(7)
    with_peft(peft, rank=4, alpha=4, targets=targets)
    fill_b(ours)
    fill_b(peft)
    assert {"up_blocks.0.resnets.0.conv_shortcut", "down_blocks.0.downsamplers.0.conv"} <= set(names)
    assert adapters(ours).keys() == adapters(peft).keys()
    inputs = (torch.randn(1, 4, 8, 8), 10, torch.randn(1, 5, 32))
    outputs = [model(*inputs).sample for model in (ours, peft)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for name, parameter in adapters(ours).items():
        assert torch.equal(parameter.grad, adapters(peft)[name].grad)


def saved_bytes(layers, x):
    """Bytes kept for backward, apart from parameters, by projections of one input."""
    own = {p.untyped_storage().data_ptr() for layer in layers for p in layer.parameters()}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = [layer(x) for layer in layers]
    del outputs
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)


def test_three_projections_keep_their_input_once():
    x = torch.randn(2, 50, 32, dtype=torch.bfloat16, requires_grad=True)
    bases = nn.ModuleDict({name: nn.Linear(32, 48, dtype=torch.bfloat16) for name in "qkv"})
    peft = with_peft(copy.deepcopy(bases), rank=4, alpha=4, targets=["q", "k", "v"])
    for name, parameter in adapters(peft).items():
        assert "lora" in name
        parameter.data = parameter.data.float()  # as fastcraft has had it: float32 masters
    inject_lora(bases, rank=4, alpha=8, targets=["q", "k", "v"])
    low_rank, factors = 2 * 50 * 4 * 2, (32 + 48) * 4 * 2
    assert saved_bytes([*bases.values()], x) == x.nbytes + 3 * (low_rank + factors)
    assert saved_bytes([*peft.values()], x) >= 3 * x.numel() * 4 + 3 * 2 * low_rank
    conv = LoRALayer(nn.Conv2d(8, 12, 3, padding=1, dtype=torch.bfloat16), rank=2, alpha=2)
    image = torch.randn(2, 8, 6, 6, dtype=torch.bfloat16, requires_grad=True)
    assert saved_bytes([conv], image) <= image.nbytes * (1 + 2 / 8) + (8 * 9 + 12) * 2 * 2


def test_bfloat16_gradients_are_float32_and_right_to_rounding():
    torch.manual_seed(0)
    layer = LoRALayer(nn.Linear(32, 24, dtype=torch.bfloat16), rank=4, alpha=2)
    nn.init.normal_(layer.lora_B.weight, std=0.3)
    x, up = torch.randn(64, 32).bfloat16(), torch.randn(64, 24).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    (layer(x) * up).sum().backward()
    a, b = (factor.weight.detach().double().requires_grad_() for factor in (layer.lora_A, layer.lora_B))
    ((x.double() @ a.T @ b.T) * 0.5 * up.double()).sum().backward()
    for ours, exact in ((layer.lora_A.weight.grad, a.grad), (layer.lora_B.weight.grad, b.grad)):
        assert ours.dtype == torch.float32
        distance = (ours.double() - exact).norm() / exact.norm()
        assert 0 < distance < 2 * torch.finfo(torch.bfloat16).eps


def test_only_adapters_are_trained_and_the_model_is_unchanged(make_text_model, input_ids):
    model = make_text_model()
    expected = model(input_ids).last_hidden_state
    names = inject_lora(model, rank=2, alpha=1, targets=["q_proj", "mlp.fc1"])
    assert [name.removeprefix("text_model.") for name in names] == [
        f"encoder.layers.{i}.{linear}" for i in (0, 1) for linear in ("self_attn.q_proj", "mlp.fc1")
    ]
    assert torch.equal(model(input_ids).last_hidden_state, expected)
    assert all((".lora_" in name) == p.requires_grad for name, p in model.named_parameters())
    half = small_unet().bfloat16()
    inject_lora(half, rank=2, alpha=1, targets=["conv_in"])
    assert half.dtype == torch.bfloat16  # what its callers cast their input to
    assert half.conv_in.lora_A.weight.dtype == torch.float32


def test_bad_targets_and_sizes_are_refused(make_text_model):
    model = make_text_model()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"named 'to_q'; there are \['fc1', 'fc2', 'k_proj', 'out_proj'"):
        inject_lora(model, rank=2, alpha=1, targets=["q_proj", "to_q"])
    with pytest.raises(ValueError, match="named 'proj'"):
        inject_lora(model, rank=2, alpha=1, targets=["proj"])  # what a name ends in, but not behind a dot
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    with pytest.raises(ValueError, match="rank: must be at least 1, got 0"):
        inject_lora(model, rank=0, alpha=1, targets=TEXT_TARGETS)
    inject_lora(model, rank=2, alpha=1, targets=TEXT_TARGETS)
    with pytest.raises(ValueError, match="LoRA layers already"):
        inject_lora(model, rank=2, alpha=1, targets=["fc1"])
    with pytest.raises(ValueError, match="one group"):
        LoRALayer(nn.Conv2d(4, 4, 1, groups=2), rank=1, alpha=1)
    with pytest.raises(ValueError, match=r"'to_out\.0'"):
        inject_lora(small_unet(), rank=2, alpha=1, targets=["nothing"])


def test_presets_on_a_stable_diffusion_unet():
    """Counts of kohya's default (192 modules) and of LongAlign's released adapters (224, 28,291,072 values)."""
    from diffusers import UNet2DConditionModel

    for targets, count, size in (
        (lora.UNET_TARGETS, 128, 199_296 * 16),
        (lora.UNET_LINEAR_TARGETS, 192, None),
        (lora.LONGALIGN_TARGETS, 224, 28_291_072 // 2),
        (lora.UNET_CONV_TARGETS, 192 + 22 * 3 + 14 + 6, None),
    ):
        with torch.device("meta"):
            unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
            names = inject_lora(unet, rank=16, alpha=16, targets=targets)
        assert len(names) == count
        assert size in (None, sum(p.numel() for p in adapters(unet).values()))


def test_adapters_off_is_the_model_before(make_text_model, input_ids):
    model = make_text_model()
    plain = model(input_ids).last_hidden_state
    inject_lora(model, rank=4, alpha=8, targets=TEXT_TARGETS)
    fill_b(model)
    trained = model(input_ids).last_hidden_state
    assert not torch.equal(trained, plain)
    with torch.no_grad(), adapters_off(model):
        with adapters_off(model):
            assert torch.equal(model(input_ids).last_hidden_state, plain)
        assert torch.equal(model(input_ids).last_hidden_state, plain)
    assert torch.equal(model(input_ids).last_hidden_state, trained)
    with pytest.raises(KeyError), torch.no_grad(), adapters_off(model):
        raise KeyError
    assert torch.equal(model(input_ids).last_hidden_state, trained)


def test_adapters_off_refuses_gradients(make_text_model, input_ids):
    """A checkpoint would recompute with the adapters on: another forward than the one it stands for."""
    model = make_text_model()
    inject_lora(model, rank=4, alpha=8, targets=TEXT_TARGETS)
    with pytest.raises(RuntimeError, match=r"torch\.no_grad"), adapters_off(model):
        pass
    with (
        torch.no_grad(),
        adapters_off(model),
        torch.enable_grad(),
        pytest.raises(RuntimeError, match=r"torch\.no_grad"),
    ):
        checkpoint(model, input_ids, use_reentrant=False)
    layer = next(m for m in model.modules() if isinstance(m, LoRALayer))
    x = torch.randn(2, 32, requires_grad=True)
    kept = checkpoint(layer, x, use_reentrant=False)
    with torch.no_grad(), adapters_off(model):
        layer(x)
    kept.sum().backward()  # recomputed after a block, with the adapters on
    assert layer.lora_B.weight.grad.abs().max() > 0


def unet_results(unet, latents, text):
    """Output, and its gradients to the text and to every adapter."""
    kwargs = {"conditioning": condition(unet, text)}
    output = unet(latents, 300, encoder_hidden_states=None, cross_attention_kwargs=kwargs).sample
    weight = torch.linspace(-1, 1, output.numel()).view(output.shape)
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), [text, *adapters(unet).values()])]


@pytest.mark.parametrize("targets", [lora.UNET_TARGETS, lora.UNET_CONV_TARGETS], ids=["attention", "conv"])
def test_a_patched_unet_agrees(targets):
    unet = make_narrow("sd15").unet
    names = inject_lora(unet, rank=2, alpha=4, targets=targets)
    fill_b(unet)
    use_text_kv(unet)
    latents, text = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 24, requires_grad=True)
    plain = unet_results(unet, latents, text)
    strides = {name: p.stride() for name, p in adapters(unet).items()}
    with Patch(unet, backend="reference") as patch:
        assert {name: p.stride() for name, p in adapters(unet).items()} == strides  # a trained weight stays in place
        patched = unet_results(unet, latents, text)
    loudest = max(wanted.abs().max().item() for wanted in plain[2:])
    for ours, wanted in zip(patched, plain, strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item() + 1e-6 * loudest)
    reasons = {swap.module: swap.reason for swap in patch.swaps[0] if swap.reason}
    wrapped = {name.rpartition(".")[0] for name in names if name.endswith((".conv1", ".proj_in"))}
    assert set(reasons) == wrapped
    assert all("must be plain" in reason for reason in reasons.values())
    assert {s.ops for s in patch.swaps[0] if s.ops} >= {"attention", "cross_attention", "geglu", "layer_norm"}
