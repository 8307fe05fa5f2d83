"""Patched and plain networks agree in outputs and gradients, and a patch leaves no trace."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastcraft.diffusion.decode import decode
from fastcraft.diffusion.patch import Patch
from fastcraft.diffusion.samplers.ddim import ddim
from fastcraft.diffusion.unroll import denoise
from fastcraft.errors import UserError
from fastcraft.families.unet import UNetNetwork, use_text_kv
from fastcraft.memory.policies import POLICIES, make_policy
from fastcraft.records import Trajectory
from fastcraft_kernels.backend import current_backend
from tests.diffusion.narrow_models import CONFIGS, make_narrow
from tests.diffusion.texts import condition


def call(narrow, latents, inputs, timestep=300):
    """Output of the UNet and its gradient to text and pooled text."""
    output = narrow.unet(latents, timestep, **narrow.arguments(*inputs), return_dict=False)[0]
    weight = torch.linspace(-1, 1, output.numel()).view(output.shape)
    grads = torch.autograd.grad((output * weight).sum(), inputs, allow_unused=True)
    return [output.detach(), *(grad for grad in grads if grad is not None)]


def agree(ours, plain, *, rtol=2e-4):
    assert len(ours) == len(plain)
    for a, b in zip(ours, plain, strict=True):
        assert b.abs().max() > 1e-4
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * b.abs().max().item())


def trace(model):
    """Everything that a patch may touch."""
    attributes = {
        name: {k: v for k, v in module.__dict__.items() if k != "training" and not k.startswith("_")}
        for name, module in model.named_modules()
    }
    tensors = {name: (tensor.clone(), tensor.stride()) for name, tensor in model.state_dict().items()}
    return attributes, tensors


def assert_untouched(model, before):
    attributes, tensors = trace(model)
    assert attributes == before[0]
    assert {name: stride for name, (_, stride) in tensors.items()} == {n: s for n, (_, s) in before[1].items()}
    assert all(torch.equal(tensor, before[1][name][0]) for name, (tensor, _) in tensors.items())


@pytest.fixture(params=CONFIGS)
def narrow(request):
    return make_narrow(request.param)


def smallest_unet():
    """One level, for what takes long on more."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=4, block_out_channels=(40,), attention_head_dim=1, layers_per_block=1, cross_attention_dim=8,
        norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    ).requires_grad_(False)  # fmt: skip


@pytest.fixture
def vae():
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    levels = 3
    return (
        AutoencoderKL(
            block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8, latent_channels=4, sample_size=32,
            down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        )
        .requires_grad_(False)
        .eval()
    )  # fmt: skip


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_unet_agrees_and_is_restored(narrow, train):
    latents = torch.randn(2, 4, 8, 8)
    inputs = [torch.randn(2, 7, 24, requires_grad=True), torch.randn(2, 20, requires_grad=True)]
    narrow.unet.train(train)
    plain = call(narrow, latents, inputs)
    before = trace(narrow.unet)
    with Patch(narrow.unet, backend="reference") as patch:
        assert current_backend() == "reference"
        patched = call(narrow, latents, inputs)
        again = call(narrow, latents, inputs)
    assert len(plain) == (3 if narrow.name == "sdxl" else 2)  # pooled text reaches SDXL through the time embedding
    agree(patched, plain)
    assert all(torch.equal(a, b) for a, b in zip(patched, again, strict=True))
    assert [swap for swap in patch.swaps[0] if swap.reason] == []
    assert current_backend() == "auto"
    assert_untouched(narrow.unet, before)
    assert all(torch.equal(a, b) for a, b in zip(call(narrow, latents, inputs), plain, strict=True))


def test_every_op_takes_part(narrow):
    ops = {swap.ops for swap in Patch(narrow.unet).swaps[0]}
    assert ops == {
        "frozen_conv2d", "group_norm_silu + frozen_conv2d", "group_norm_silu + frozen_linear", "group_norm_silu",
        "layer_norm", "attention", "cross_attention", "geglu",
    }  # fmt: skip


def test_odd_latents_and_large_batches(narrow):
    """Sizes that are no multiple of the downsampling; one row; pictures that are not channels-last."""
    inputs = [torch.randn(1, 7, 24, requires_grad=True), torch.randn(1, 20, requires_grad=True)]
    latents = torch.randn(1, 4, 7, 10)
    plain = call(narrow, latents, inputs)
    with Patch(narrow.unet, backend="reference"):
        agree(call(narrow, latents, inputs), plain)


def test_vae_agrees_and_is_restored(vae):
    latents = torch.randn(1, 4, 4, 4, requires_grad=True)
    image = torch.randn(1, 3, 16, 16, requires_grad=True)

    def run():
        picture, code = vae.decode(latents).sample, vae.encode(image).latent_dist.mean
        weighted = [(x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in (picture, code)]
        return [picture.detach(), code.detach(), *torch.autograd.grad(sum(weighted), (latents, image))]

    plain, before = run(), trace(vae)
    with Patch(vae, backend="reference") as patch:
        agree(run(), plain)
    assert_untouched(vae, before)
    folded = [swap.module for swap in patch.swaps[0] if swap.ops == "group_norm_silu with residual"]
    assert folded == [f"decoder.up_blocks.{i}" for i in range(3)]
    refused = {swap.module: swap.reason for swap in patch.swaps[0] if swap.reason}
    assert refused == {
        f"{part}.mid_block.attentions.0": "its head width is 32 / 1; the kernels know 40, 64, 80, 160"
        for part in ("encoder", "decoder")
    }


RUNNABLE = (
    "none", "step", "step+block", "sac:attention+conv", "sac:fastcraft+linear", "segment:2", "last_k_live:1",
    "plan:recompute,keep", "batched:2",
)  # fmt: skip


def test_no_policy_is_forgotten():
    """Offloading needs a GPU."""
    assert {name.partition(":")[0] for name in RUNNABLE} | {"offload"} == set(POLICIES.names())


@pytest.mark.parametrize("policy", RUNNABLE)
@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_unrolled_gradient_under_every_policy(name, policy, vae, tiny_parts):
    """The project's loop: text keys once per prompt, guidance, two steps with gradient, decode."""
    unet = make_narrow(name).unet
    use_text_kv(unet)
    sampler = ddim(tiny_parts.components.schedule, num_inference_steps=3)
    plan = make_policy(policy).plan(2)
    noise = torch.randn(2, 4, 8, 8)
    inputs = [torch.randn(rows, 7, 24, requires_grad=True) for rows in (2, 1)]

    def run():
        latents = denoise(
            UNetNetwork(module=unet), noise, condition(unet, *inputs), sampler=sampler, guidance_scale=3.0,
            trajectory=Trajectory(num_steps=3, grad_steps=(1, 2), input_grad=not plan.batched), plan=plan,
        )  # fmt: skip
        pictures = decode(vae, latents, plan)
        weight = torch.linspace(-1, 1, pictures.numel()).view(pictures.shape)
        return [pictures.detach(), *torch.autograd.grad((pictures * weight).sum(), inputs)]

    plain = run()
    with Patch(unet, vae, backend="reference"):
        agree(run(), plain, rtol=1e-3)


def test_a_text_too_long_for_the_op():
    narrow = make_narrow("sd21")
    inputs = [torch.randn(1, 600, 24, requires_grad=True), torch.randn(1, 20, requires_grad=True)]
    latents = torch.randn(1, 4, 8, 8)
    plain = call(narrow, latents, inputs)
    with Patch(narrow.unet, backend="reference"):
        agree(call(narrow, latents, inputs), plain)


def count_flops(run, shape):
    """FLOPs of ``run`` on an input of ``shape``: (forward, backward to the input)."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(shape, requires_grad=True)
        with FlopCounterMode(display=False) as forward:
            output = run(x)
        with FlopCounterMode(display=False) as backward:
            output.float().sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def test_flops_are_those_of_the_plain_unet():
    """A dry run counts a patched model; one that counted an op at nothing would promise too much."""
    network, text = smallest_unet(), torch.randn(1, 5, 8)

    def unet(x):
        return network(x, 300, text, return_dict=False)[0]

    without_attention = count_flops(unet, (1, 4, 4, 4))  # PyTorch does not count its attention on a CPU
    with sdpa_kernel(SDPBackend.MATH):
        forward, _ = count_flops(unet, (1, 4, 4, 4))
    attention = forward - without_attention[0]
    assert attention > 1e4
    with Patch(network, backend="reference"):
        assert count_flops(unet, (1, 4, 4, 4)) == (forward, without_attention[1] + 5 * attention // 2)


def test_blocks_checkpointed_by_diffusers(narrow):
    latents = torch.randn(2, 4, 8, 8)
    inputs = [torch.randn(2, 7, 24, requires_grad=True), torch.randn(2, 20, requires_grad=True)]
    narrow.unet.train()
    with Patch(narrow.unet, backend="reference"):
        kept = call(narrow, latents, inputs)
        narrow.unet.enable_gradient_checkpointing()
        agree(call(narrow, latents, inputs), kept, rtol=1e-6)


def test_under_compile():
    torch.compiler.reset()  # what other tests compiled of diffusers' code counts against the limit of recompilations
    unet = smallest_unet()
    latents, text = torch.randn(2, 4, 4, 4), torch.randn(2, 5, 8, requires_grad=True)

    def run(network):
        output = network(latents, 300, encoder_hidden_states=text, return_dict=False)[0]
        return [output.detach(), *torch.autograd.grad(output.square().sum(), text)]

    plain = run(unet)
    with Patch(unet, backend="reference"):
        agree(run(torch.compile(unet, backend="aot_eager", fullgraph=True)), plain)


def test_trained_weights_get_their_gradient(narrow):
    """A patch does not need a frozen network; it only saves less where it is."""
    unet = narrow.unet.requires_grad_(True)
    latents, text, pooled = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 24), torch.randn(1, 20)
    names, parameters = zip(*unet.named_parameters(), strict=True)

    def run():
        output = unet(latents, 300, **narrow.arguments(text, pooled), return_dict=False)[0]
        weight = torch.linspace(-1, 1, output.numel()).view(output.shape)
        return torch.autograd.grad((output * weight).sum(), parameters)

    plain = run()
    with Patch(unet, backend="reference"):
        patched = run()
    for name, a, b in zip(names, patched, plain, strict=True):
        limit = 1e-3 * max(b.abs().max().item(), 1e-2)
        assert (a - b).abs().max().item() <= limit, name


@pytest.mark.parametrize(
    ("change", "module", "reason"),
    [
        (lambda r: setattr(r.dropout, "p", 0.1), "resnet", "it has dropout 0.1"),
        (lambda r: setattr(r, "nonlinearity", nn.GELU()), "resnet", "nonlinearity must be plain SiLU"),
        (lambda r: setattr(r, "skip_time_act", True), "resnet", "its time embedding arrives activated"),
        (
            lambda r: setattr(r, "time_embedding_norm", "scale_shift"),
            "resnet",
            "its time embedding is 'scale_shift', no",
        ),
        (lambda r: r.norm1.register_forward_hook(print), "resnet", "its norm1 has a hook or another forward"),
        (lambda r: setattr(r, "forward", print), "resnet", "its forward has been replaced already"),
        (lambda r: setattr(r.conv2, "padding_mode", "reflect"), "resnet.conv2", "its padding mode is 'reflect'"),
    ],
    ids=["dropout", "gelu", "activated", "scale", "hook", "forward", "padding"],
)
def test_guards_refuse_with_the_reason(change, module, reason):
    from diffusers.models.resnet import ResnetBlock2D

    holder = nn.Module()
    holder.resnet = ResnetBlock2D(in_channels=8, out_channels=8, temb_channels=4, groups=4)
    change(holder.resnet)
    patch = Patch(holder)
    found = {swap.module: swap.reason for swap in patch.swaps[0]}
    assert found[module].startswith(reason)
    if module == "resnet":  # what is inside a refused block is patched one by one
        assert {swap.module for swap in patch.swaps[0] if swap.ops} >= {"resnet.norm2", "resnet.conv1", "resnet.conv2"}


def test_transformer_guards():
    unet = make_narrow("sd21").unet
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    block.set_chunk_feed_forward(2)
    block.attn1.to_out[1].p = 0.5
    block.attn2.norm_q = nn.Identity()
    found = {swap.module: swap.reason for swap in Patch(unet).swaps[0] if swap.reason}
    where = "mid_block.attentions.0.transformer_blocks.0"
    assert found == {
        where: "its feed-forward is chunked",
        f"{where}.attn1": "it has dropout 0.5",
        f"{where}.attn2": "it has norm_q inside",
    }


def test_calls_that_a_patched_block_cannot_serve():
    narrow = make_narrow("sd21")
    latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 24)
    with Patch(narrow.unet, backend="reference"):
        with pytest.raises(ValueError, match="attention_mask must be None in a patched UNet, got a tensor of shape"):
            narrow.unet(latents, 1, text, encoder_attention_mask=torch.ones(1, 7))
        with pytest.raises(ValueError, match=r"attn2' got neither conditioning nor encoder_hidden_states"):
            narrow.unet(latents, 1, None)
        narrow.unet.mid_block.attentions[0].transformer_blocks[0].set_chunk_feed_forward(2)
        with pytest.raises(ValueError, match="a patched block has no chunked feed-forward, got 2"):
            narrow.unet(latents, 1, text)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda block: setattr(block.resnets[1].dropout, "p", 0.1), "a resnet in it is left as it is"),
        (lambda block: setattr(block.resnets[0], "output_scale_factor", 2), "its resnets scale their sums"),
        (lambda block: block.resnets[1].register_forward_hook(print), "a resnet in it has a hook, which would not run"),
        (lambda block: block.resnets.append(nn.Identity()), "resnets must be plain ResnetBlock2D"),
    ],
    ids=["refused", "scaled", "hook", "other"],
)
def test_decoder_block_guards(vae, change, reason):
    """Its ResNets are patched one by one where it is left."""
    change(vae.decoder.up_blocks[1])
    swaps = {swap.module: swap for swap in Patch(vae).swaps[0]}
    assert swaps["decoder.up_blocks.1"].reason == reason
    assert swaps["decoder.up_blocks.2"].ops == "group_norm_silu with residual"
    others = swaps["decoder.up_blocks.1.resnets.0"], swaps["decoder.up_blocks.1.resnets.1"]
    assert [bool(swap.ops) for swap in others] == [True, reason != "a resnet in it is left as it is"]


def test_sums_inside_a_decoder_block_are_made_in_the_norms(vae):
    """Three blocks of two ResNets each: one sum a block."""
    calls = []
    vae.decoder.up_blocks[0].resnets[1].norm1.eps = 3e-4  # known by its eps among the norms
    op = torch.ops.fastcraft.group_norm_silu.default

    class Sums(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is op:
                calls.append((args[4] is not None, args[6]))
            return func(*args, **(kwargs or {}))

    with Patch(vae, backend="reference"), Sums():
        vae.decode(torch.randn(1, 4, 4, 4))
    assert sum(with_residual for with_residual, _ in calls) == 3
    assert (True, 3e-4) in calls


def test_convolution_weights_are_channels_last_meanwhile(vae):
    """Both layouts, weights changed in between, and a patch that fails half-way."""
    convs = {name: module for name, module in vae.named_modules() if type(module) is nn.Conv2d}
    with torch.no_grad():
        vae.decoder.conv_in.weight.data = vae.decoder.conv_in.weight.contiguous(memory_format=torch.channels_last)
    before = trace(vae)
    with Patch(vae, backend="reference"):
        assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convs.values())
        assert not convs["decoder.conv_out"].weight.is_contiguous()
        with torch.no_grad():
            convs["decoder.conv_out"].weight.add_(1)
    with torch.no_grad():
        assert torch.equal(convs["decoder.conv_out"].weight, before[1]["decoder.conv_out.weight"][0] + 1)
        convs["decoder.conv_out"].weight.copy_(before[1]["decoder.conv_out.weight"][0])
    assert_untouched(vae, before)
    patch = Patch(vae, backend="reference")
    patch._replacements.append((object(), "forward", None))  # has no __dict__ to write to
    with pytest.raises(AttributeError):
        patch.apply()
    assert_untouched(vae, before)
    assert current_backend() == "auto"


def test_patching_twice(narrow):
    with Patch(narrow.unet, backend="reference") as patch:
        with pytest.raises(ValueError, match="this patch is on already"):
            patch.apply()
        second = Patch(copy.deepcopy(narrow.unet))
        assert all(swap.ops != "group_norm_silu + frozen_conv2d" for swap in second.swaps[0])
        assert "left as they are" in second.summary()


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("tritn", "unknown name 'tritn'; did you mean 'triton'"),
        ("triton", "'triton' cannot serve Conv2d: the kernels need"),
    ],
)
def test_backends_are_refused_with_the_reason(backend, message):
    with pytest.raises(UserError, match=message):
        Patch(nn.Conv2d(2, 2, 1), backend=backend)
