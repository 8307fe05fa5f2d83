"""Inputs of adapters that backward makes again: the same gradients to the bit, fewer bytes, and nothing left behind."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from fastcraft import remade
from fastcraft.diffusion.patch import Patch
from fastcraft.diffusion.samplers.ddim import ddim
from fastcraft.diffusion.schedule import NoiseSchedule
from fastcraft.diffusion.unroll import denoise
from fastcraft.families.unet import UNetNetwork, use_text_kv
from fastcraft.memory.plan import KEEP, RECOMPUTE, RECOMPUTE_BLOCKS, CheckpointPlan
from fastcraft.records import PromptEmbeds, TextEmbeds, Trajectory
from fastcraft.trained.lora import UNET_LINEAR_TARGETS, UNET_TARGETS, LoRALayer, adapters_off, inject_lora
from tests.diffusion.narrow_models import make_smallest

PLANS = {
    "keep": CheckpointPlan(steps=(KEEP, KEEP)),
    "recompute": CheckpointPlan(steps=(RECOMPUTE, KEEP)),
    "blocks": CheckpointPlan(steps=(RECOMPUTE_BLOCKS, KEEP)),
    "sac": CheckpointPlan(steps=("sac:attention+linear", "sac:norm")),
    "segments": CheckpointPlan(steps=(RECOMPUTE, RECOMPUTE), segments=(2,)),
}

NUM_REMADE = 2 * 4 * 8 - 1
"""Steps, blocks, all adapters but attn1.to_out's and proj_out's; what the first proj_in reads has no gradient yet."""


def switched_off(monkeypatch):
    """Nothing is marked, so that everything is kept as without this module."""
    for module in ("fused_forwards", "fused_attention"):
        monkeypatch.setattr(f"fastcraft.diffusion.{module}.remakeable", lambda out, *_: out)


def trained_unet(targets=UNET_LINEAR_TARGETS):
    unet = make_smallest()
    inject_lora(unet, rank=2, alpha=4, targets=targets)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    use_text_kv(unet)
    return unet


def step_gradients(unet, plan):
    """The latents after three guided steps, the last two with gradient; and their gradients to text and adapters."""
    generator = torch.Generator().manual_seed(4)
    cond, uncond, latents = (torch.randn(shape, generator=generator) for shape in ((2, 5, 8), (1, 5, 8), (2, 4, 4, 4)))
    leaves = [cond.requires_grad_(), uncond.requires_grad_()]
    network = UNetNetwork(module=unet)
    prompts = PromptEmbeds(cond=TextEmbeds(sequence=cond), uncond=TextEmbeds(sequence=uncond))
    schedule = NoiseSchedule(alphas_cumprod=(0.9, 0.8, 0.7), final_alpha_cumprod=1.0)
    output = denoise(
        network, latents, network.condition(prompts), sampler=ddim(schedule, num_inference_steps=3), guidance_scale=2.0,
        trajectory=Trajectory(num_steps=3, grad_steps=(1, 2)), plan=plan,
    )  # fmt: skip
    leaves += [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for leaf in leaves:
        leaf.grad = None
    output.square().sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("name", PLANS)
def test_gradients_are_those_of_kept_inputs_to_the_bit(name, monkeypatch):
    unet = trained_unet()
    made = []
    take = remade._Maker.take
    monkeypatch.setattr(remade._Maker, "take", lambda *args: made.append(1) or take(*args))
    with Patch(unet, backend="reference"):
        ours = step_gradients(unet, PLANS[name])
        assert len(made) == NUM_REMADE
        switched_off(monkeypatch)
        kept = step_gradients(unet, PLANS["keep"])
        assert len(made) == NUM_REMADE
    assert all(gradient.abs().max() > 0 for gradient in kept)
    assert all(torch.equal(a, b) for a, b in zip(ours, kept, strict=True))


def test_without_gradient_and_without_adapters_nothing_is_marked():
    unet = trained_unet(UNET_TARGETS)
    kv = UNetNetwork(module=unet).condition(PromptEmbeds(cond=TextEmbeds(sequence=torch.randn(1, 5, 8)))).detach()
    seen = []
    layer = next(module for module in unet.modules() if isinstance(module, LoRALayer))
    layer.base.register_forward_pre_hook(lambda _, args: seen.append(hasattr(args[0], remade._MARK)))

    def run():
        return UNetNetwork(module=unet).predict(torch.randn(1, 4, 4, 4), torch.tensor(9), kv, guided=False)

    with Patch(unet, backend="reference"):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                run()
                with adapters_off(unet):
                    run()
        run()
        unet.requires_grad_(True)
        run()
    assert seen == [False] * 5 + [True]  # of the first block nothing requires gradient while the rest is frozen


def normed(x, *, marked, scale=2.0):
    """An op that keeps its input; counts how often it runs."""
    calls = []

    def make(h):
        calls.append(1)
        return torch.sin(h * scale)

    out = make(x)
    return (remade.remakeable(out, make, x) if marked else out), calls


def test_three_layers_share_what_is_made_and_the_last_frees_it(monkeypatch):
    x = torch.randn(3, 5, 8, requires_grad=True)
    weights = [nn.Parameter(torch.randn(4, 8)) for _ in range(3)]
    out, calls = normed(x, marked=True)
    maker = getattr(out, remade._MARK)[0]
    total = torch.stack([remade.linear(out, weight) for weight in weights]).square().sum()
    kept = weakref.ref(out)
    del out
    gc.collect()
    assert kept() is None
    for number in (2, 3):
        found = torch.autograd.grad(total, [x, *weights], retain_graph=True)
        assert len(calls) == number
        assert maker._made is None
    (only,) = torch.autograd.grad(total, [weights[1]], retain_graph=True)  # the others do not come: still right
    again = torch.autograd.grad(total, [x, *weights])
    plain, _ = normed(x, marked=False)
    expected = torch.stack([F.linear(plain, weight) for weight in weights]).square().sum()
    wanted = torch.autograd.grad(expected, [x, *weights])
    assert torch.equal(only, wanted[2])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(wanted, found, again, strict=True))


def test_bytes_and_dtypes_of_a_bfloat16_layer():
    kept, x = [], torch.randn(6, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = nn.Parameter(torch.randn(2, 8))

    def pack(tensor):
        kept.append(tensor)
        return tensor

    results = []
    for marked in (True, False):
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            out, _ = normed(x, marked=marked)
            kept.clear()
            z = remade.linear(out, weight)
        own = {x.data_ptr(), weight.data_ptr()}
        assert ({tensor.data_ptr() for tensor in kept} <= own) == marked
        z.float().square().sum().backward()
        results.append((z, x.grad, weight.grad))
        x.grad = weight.grad = None
    assert results[0][2].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_source_that_changed_is_refused():
    x = torch.randn(2, 8, requires_grad=True)
    h = x * 1
    z = remade.linear(remade.remakeable(h * 2, lambda h: h * 2, h), nn.Parameter(torch.randn(3, 8)))
    h.data.add_(0)
    with torch.no_grad():
        h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_inside_a_checkpoint_nothing_is_held_before_backward():
    x, weight = torch.randn(4, 8, requires_grad=True), nn.Parameter(torch.randn(3, 8))
    inside = []

    def call(x):
        h = x.exp()
        inside.append(weakref.ref(h))
        out, _ = normed(h, marked=True)
        return remade.linear(out, weight)

    z = checkpoint(call, x, use_reentrant=False)
    gc.collect()
    assert inside[0]() is None
    z.sum().backward()
    found, weight.grad = weight.grad, None
    F.linear((x.exp() * 2).sin(), weight).sum().backward()
    assert torch.equal(found, weight.grad)
