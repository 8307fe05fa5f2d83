"""Text projected once: the same prediction and the same gradient as the plain UNet."""

from contextlib import nullcontext

import pytest
import torch

from fastcraft.diffusion.patch import Patch
from fastcraft.errors import UserError
from fastcraft.families.unet import UNetNetwork, use_text_kv
from tests.diffusion.narrow_models import make_smallest
from tests.diffusion.texts import condition


@pytest.mark.parametrize("guided", [False, True])
def test_projected_text_equals_the_plain_unet(tiny_parts, guided):
    torch.manual_seed(1)
    unet, stock = tiny_parts.components.unet, tiny_parts.stock
    latents = torch.randn(2, 4, 8, 8)
    cond = torch.randn(2, 77, 32, requires_grad=True)
    uncond = torch.randn(1, 77, 32, requires_grad=True)
    plain_cond, plain_uncond = (x.detach().clone().requires_grad_() for x in (cond, uncond))

    total, plain_total = torch.zeros(()), torch.zeros(())
    conditioning = condition(unet, cond, uncond if guided else None)
    for t in (999, 519, 39):
        ours = UNetNetwork(module=unet).predict(latents, torch.tensor(t), conditioning, guided=guided)
        if guided:
            embeds = torch.cat([plain_uncond.expand(2, -1, -1), plain_cond])
            plain = stock(torch.cat([latents, latents]), t, encoder_hidden_states=embeds).sample
        else:
            plain = stock(latents, t, encoder_hidden_states=plain_cond).sample
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
        total, plain_total = total + ours.square().sum(), plain_total + plain.square().sum()

    inputs = (cond, uncond) if guided else (cond,)
    plain_inputs = (plain_cond, plain_uncond) if guided else (plain_cond,)
    for ours, plain in zip(
        torch.autograd.grad(total, inputs), torch.autograd.grad(plain_total, plain_inputs), strict=True
    ):
        assert plain.abs().max() > 1e-3
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())


def test_text_is_projected_once_for_all_steps(tiny_parts):
    unet = tiny_parts.components.unet
    calls = []
    for name, module in unet.named_modules():
        if name.endswith("attn2.to_k"):
            module.register_forward_hook(lambda *args: calls.append(1))
    network, conditioning = UNetNetwork(module=unet), condition(unet, torch.randn(2, 77, 32))
    for t in range(3):
        network.predict(torch.randn(2, 4, 8, 8), torch.tensor(t), conditioning, guided=False)
    assert len(calls) == len(conditioning.layers) > 0


def test_missing_text_is_an_error(tiny_parts):
    with pytest.raises(ValueError, match="got no conditioning"):
        tiny_parts.components.unet(torch.randn(1, 4, 8, 8), 1, encoder_hidden_states=None)


def test_unknown_attention_part_is_refused(tiny_parts):
    tiny_parts.stock.mid_block.attentions[0].transformer_blocks[0].attn1.norm_q = torch.nn.LayerNorm(4)
    with pytest.raises(UserError, match="has 'norm_q', which is not supported"):
        use_text_kv(tiny_parts.stock)


@pytest.mark.parametrize(("length", "rows"), [(7, 4), (520, 6)])
def test_fused_layers_hold_the_unconditional_text_once(length, rows):
    """Three guided samples: the first three of six rows read row 0 in place, unless the op does not know the length."""
    unet = make_smallest()
    use_text_kv(unet)
    cond, uncond = torch.randn(3, length, 8, requires_grad=True), torch.randn(1, length, 8, requires_grad=True)
    latents = torch.randn(3, 4, 4, 4)

    def predict(conditioning):
        output = UNetNetwork(module=unet).predict(latents, torch.tensor(99), conditioning, guided=True)
        return [output.detach(), *torch.autograd.grad((output * torch.arange(4.0)).sum(), (cond, uncond))]

    plain_text = condition(unet, cond, uncond)
    assert {x.shape[0] for x in plain_text.flat()} == {6}
    plain = predict(plain_text)
    with Patch(unet, backend="reference"):
        fused_text = condition(unet, cond, uncond)
        assert {x.shape[0] for x in fused_text.flat()} == {rows}
        results = [predict(condition(unet, cond, uncond)), predict(condition(unet, cond, uncond))]
    results.append(predict(fused_text))  # plain layers read what fused ones were given
    for result in results:
        for ours, expected in zip(result, plain, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_repeated_text_serves_a_batch_that_is_stacked(guided, fused):
    unet = make_smallest()
    use_text_kv(unet)
    cond, uncond = torch.randn(3, 7, 8), torch.randn(1, 7, 8) if guided else None
    latents, timesteps = torch.randn(2, 3, 4, 4, 4), torch.tensor([99, 500])
    with Patch(unet, backend="reference") if fused else nullcontext(), torch.no_grad():
        network, text = UNetNetwork(module=unet), condition(unet, cond, uncond)
        single = [network.predict(x, t, text, guided=guided) for x, t in zip(latents, timesteps, strict=True)]
        stacked = network.predict(
            latents.flatten(0, 1), timesteps.repeat_interleave(3), text.repeat(2, num_samples=3), guided=guided
        )
    expected = torch.cat([torch.cat(parts) for parts in zip(*(x.split(3) for x in single), strict=True)])
    torch.testing.assert_close(stacked, expected, rtol=1e-5, atol=1e-5)
