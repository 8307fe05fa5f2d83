"""Compiled and graphed UNets give what the UNet gives, and are refused where they would not.

The compiler's own backend is inductor in one test and in those marked slow; elsewhere a backend without code generation
traces the same graphs. Graphs are recorded by `CpuRecorder`, which runs the work again into the same memory.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from fastcraft.diffusion import acceleration
from fastcraft.diffusion.acceleration import AcceleratedUNet, refuse_acceleration
from fastcraft.diffusion.cuda_graphs import MAX_SHAPES
from fastcraft.diffusion.patch import Patch
from fastcraft.diffusion.samplers.ddim import ddim
from fastcraft.diffusion.schedule import NoiseSchedule
from fastcraft.errors import UserError
from fastcraft.families.components import freeze
from fastcraft.families.image_model import ImageModel
from fastcraft.families.parity import Probe, accelerate
from fastcraft.families.unet import UNetNetwork, use_text_kv
from fastcraft.memory.policies import make_policy
from fastcraft.records import Trajectory
from tests.diffusion.texts import embeds

T, K = 5, 3


class CpuRecorder:
    """Static memory without a GPU: a replay runs the work again and overwrites the outputs."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def warm_up(self, run):
        run()

    def record(self, run, *, after=None):
        self.recorded += 1
        return CpuRecording(run, self)


class CpuRecording:
    def __init__(self, run, recorder):
        self.run, self.recorder = run, recorder
        self.outputs = tuple(output.detach() for output in run())

    def replay(self):
        self.recorder.replayed += 1
        with torch.no_grad():
            for output, new in zip(self.outputs, self.run(), strict=True):
                output.copy_(new)


@pytest.fixture
def images():
    """The smallest UNet with a transformer and resnets."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = freeze(
        UNet2DConditionModel(
            sample_size=8, block_out_channels=(16,), layers_per_block=1, cross_attention_dim=32, mid_block_type=None,
            attention_head_dim=4, norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("UpBlock2D",),
        )
    )  # fmt: skip
    use_text_kv(unet)
    schedule = NoiseSchedule(
        alphas_cumprod=tuple(torch.linspace(0.999, 0.05, 1000).tolist()), final_alpha_cumprod=1.0
    )  # fmt: skip
    return ImageModel(
        network=UNetNetwork(module=unet), vae=None, guidance_scale=3.0, latent_shape=(4, 8, 8),
        sampler=ddim(schedule, num_inference_steps=T), device=torch.device("cpu"),
    )  # fmt: skip


def probe(images, policy="none", *, depth=K, batch_size=2, **options):
    plan = make_policy(policy).plan(depth)
    trajectory = Trajectory(num_steps=T, grad_steps=tuple(range(T - depth, T)), **options)
    return Probe(model=images, batch_size=batch_size, plan=plan, trajectory=trajectory)


def train(images, policy="none", *, depth=K, batch_size=2, unet=None, seed=0, **options):
    """The whole chain: the latents it ends with and the gradients to the text."""
    model = images if unet is None else replace(images, network=images.network.using(unet))
    generator = torch.Generator().manual_seed(seed)
    cond, uncond = (torch.randn(n, 77, 32, generator=generator).requires_grad_() for n in (batch_size, 1))
    text = images.condition(embeds(cond, uncond))
    latents, _ = model.noise(range(seed, seed + batch_size))
    end = model.denoise(
        latents, text, plan=make_policy(policy).plan(depth),
        trajectory=Trajectory(num_steps=T, grad_steps=tuple(range(T - depth, T)), **options),
    )  # fmt: skip
    return end.detach(), *torch.autograd.grad(end.square().mean(), (cond, uncond))


def call_once(images, unet):
    cond = torch.randn(2, 77, 32).requires_grad_()
    text = images.condition(embeds(cond, torch.randn(1, 77, 32)))
    return unet(torch.randn(4, 4, 8, 8), torch.tensor(9), cross_attention_kwargs={"conditioning": text})[0]


def assert_close(ours, eager, tolerance=1e-5):
    for one, other in zip(ours, eager, strict=True):
        assert torch.linalg.vector_norm(other) > 0
        assert torch.linalg.vector_norm(one - other) <= tolerance * torch.linalg.vector_norm(other)


def graphed(images, cuda_graphs="all", **options):
    recorder = CpuRecorder()
    return AcceleratedUNet(images.network.module, cuda_graphs=cuda_graphs, recorder=recorder, **options), recorder


@pytest.mark.parametrize("policy", ["none", "step", "last_k_live:1", "plan:keep,recompute,keep"])
@pytest.mark.parametrize("options", [{}, {"input_grad": False}, {"uncond_grad": False}])
def test_graphs_give_the_bits_of_eager(images, policy, options):
    """Several optimiser steps with different texts: nothing of an earlier call is left in the static memory."""
    unet, recorder = graphed(images)
    for seed in range(3):
        eager = train(images, policy, seed=seed, **options)
        ours = train(images, policy, unet=unet, seed=seed, **options)
        assert all(torch.equal(one, other) for one, other in zip(ours, eager, strict=True))
        if seed == 0:
            recorded = recorder.recorded
    assert recorder.recorded == recorded
    assert recorder.replayed > recorded


def test_graphs_of_the_prefix_leave_the_other_steps_alone(images):
    unet, recorder = graphed(images, "prefix")
    for policy in ("none", "sac:attention+conv", "segment:2", "step+block"):
        ours, eager = train(images, policy, unet=unet), train(images, policy)
        assert all(torch.equal(one, other) for one, other in zip(ours, eager, strict=True))
    assert recorder.recorded == 1
    assert recorder.replayed == 4 * (T - K)


def test_a_step_that_never_goes_backward_gives_its_slot_back(images):
    unet, recorder = graphed(images)
    for seed in range(3):
        train(images, unet=unet, seed=seed)
        call_once(images, unet)
        if seed == 0:
            recorded = recorder.recorded
    assert recorder.recorded == recorded


def test_kept_activations_go_backward_once(images):
    unet, _ = graphed(images)
    output = call_once(images, unet)
    output.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="goes backward once"):
        output.sum().backward()


@pytest.mark.parametrize("policy", ["none", "step"])
def test_more_kinds_of_calls_than_are_recorded_run_eager_and_are_said(images, policy):
    unet, recorder = graphed(images)
    for batch_size in range(1, MAX_SHAPES + 1):
        train(images, policy, unet=unet, batch_size=batch_size)
    recorded = recorder.recorded
    ours = train(images, policy, unet=unet, batch_size=batch_size + 1)
    assert recorder.recorded == recorded
    eager = train(images, policy, batch_size=batch_size + 1)
    assert all(torch.equal(one, other) for one, other in zip(ours, eager, strict=True))
    notes = unet.take_notes()
    assert 0 < len(notes) <= 4
    assert "8 kinds of calls are recorded; 6 x 4 x 8 x 8 runs without" in notes[0]
    assert unet.take_notes() == []


def test_without_gradient_mode_what_would_require_gradient_is_no_other_kind_of_call(images):
    unet, recorder = graphed(images)
    with torch.no_grad():
        for size in range(1, MAX_SHAPES + 1):
            unet._graphs(torch.exp, [torch.ones(size)], keep=True)
        assert unet._graphs.takes([torch.ones(MAX_SHAPES, requires_grad=True)])
    assert not unet._graphs.takes([torch.ones(MAX_SHAPES, requires_grad=True)])
    assert recorder.recorded == MAX_SHAPES


POLICIES = ["none", "step", "step+block", "segment:2", "last_k_live:1"]


@pytest.mark.parametrize("compile", ["prefix", "blocks", "whole"])
def test_compiled_code_gives_what_eager_gives_under_every_policy(images, compile):
    policies = [policy for policy in POLICIES if compile != "whole" or policy != "step+block"]
    eager = {policy: train(images, policy) for policy in policies}
    smaller = train(images, batch_size=1)
    unet, said = accelerate(
        probe(images), compile=compile, cuda_graphs="none", make=partial(AcceleratedUNet, backend="aot_eager")
    )
    assert f"compile = '{compile}': ready" in said
    for policy in policies:
        with unet.learning():  # a recomputed block is called in another way
            assert_close(train(images, policy, unet=unet), eager[policy])
    assert unet.take_notes() == []
    assert_close(train(images, unet=unet, batch_size=1), smaller, tolerance=0)
    assert any("runs eager on latents of 2 x 4 x 8 x 8 and 77 text tokens" in note for note in unet.take_notes())


@pytest.mark.parametrize("compile", ["blocks", pytest.param("whole", marks=pytest.mark.slow)])
def test_inductor_gives_what_eager_gives(images, compile, monkeypatch):
    """The real compiler and the check that every run makes; a part of a block takes seconds, a UNet a minute."""
    monkeypatch.setattr(acceleration, "BLOCKS", ("FeedForward",))
    eager = train(images, depth=1)
    unet, said = accelerate(probe(images, depth=1), compile=compile, cuda_graphs="none")
    assert "ready" in said
    assert_close(train(images, depth=1, unet=unet), eager)
    assert unet.take_notes() == []


def wrong_backward(gm, inputs):
    """A compiler whose forward is right, and whose gradients are off by a tenth."""

    def scaled(*args):
        return [out * 1.1 if isinstance(out, torch.Tensor) and out.is_floating_point() else out for out in gm(*args)]

    from functorch.compile import make_boxed_func

    return make_boxed_func(scaled)


def nothing_compiled(gm, inputs):
    return gm


def test_a_compiler_with_wrong_gradients_is_refused(images):
    """What inductor's layout optimisation does to a whole UNet on a CPU, without its minutes."""
    backend = aot_autograd(fw_compiler=nothing_compiled, bw_compiler=wrong_backward)
    with pytest.raises(UserError, match=r"^compile = 'blocks': refused, the gradient differs from eager's by 0"):
        accelerate(probe(images), compile="blocks", cuda_graphs="none", make=partial(AcceleratedUNet, backend=backend))


def broken(**faults):
    """An accelerated UNet by graphs, with something wrong in its slots."""

    def make(unet, *, compile, cuda_graphs):
        fast = AcceleratedUNet(unet, compile=compile, cuda_graphs=cuda_graphs, recorder=CpuRecorder())
        run = fast._graphs.__call__

        class Broken:
            takes = fast._graphs.takes

            def __call__(self, call, inputs, *, keep):
                return faults["output"](run(call, faults.get("inputs", tuple)(inputs), keep=keep))

        fast._graphs = Broken()
        return fast

    return make


class OldText:
    """The text of the first call in the place of every later one's."""

    def __call__(self, inputs):
        self.text = self.__dict__.get("text", inputs[2:])
        return (*inputs[:2], *self.text)


@pytest.mark.parametrize(
    ("cuda_graphs", "faults", "what"),
    [
        ("prefix", {"output": lambda output: output * 1.001}, "prefix"),
        ("prefix", {"output": lambda output: output, "inputs": OldText()}, "prefix"),
        ("prefix", {"output": lambda output: output * float("nan")}, "prefix"),
        ("all", {"output": lambda output: output + 0.1 * (output.requires_grad) * output.detach().mean()}, "step"),
        ("all", {"output": lambda output: output, "inputs": lambda x: (x[0], x[1] * 0 + 500, *x[2:])}, "prefix"),
        ("all", {"output": lambda output: 2 * output - output.detach()}, "gradient"),
    ],
)
def test_wrong_graphs_are_refused(images, cuda_graphs, faults, what):
    with pytest.raises(UserError, match=rf"^cuda_graphs = '{cuda_graphs}': refused, the {what} differs"):
        accelerate(probe(images), compile="none", cuda_graphs=cuda_graphs, make=broken(**faults))


@pytest.mark.parametrize("policy", ["none", "step"])
@pytest.mark.parametrize("depth", [1, T])
def test_right_graphs_pass_the_check(images, policy, depth):
    def make(unet, **switches):
        return AcceleratedUNet(unet, recorder=CpuRecorder(), **switches)

    unet, said = accelerate(probe(images, policy, depth=depth), compile="none", cuda_graphs="all", make=make)
    assert unet.graphs_grad
    assert "gradient 0.0e+00" in said
    assert ("prefix 0.0e+00" in said) == (depth < T)


def test_what_cannot_be_compiled_is_one_line(images):
    def nothing(gm, inputs):
        raise OSError("no compiler\nand much more")

    with pytest.raises(UserError, match=r"^compile = 'prefix': cannot be had here: ") as refused:
        accelerate(probe(images), compile="prefix", cuda_graphs="none", make=partial(AcceleratedUNet, backend=nothing))
    assert "\n" not in str(refused.value)


def test_a_patched_unet_is_compiled_and_graphed(images):
    with Patch(images.network.module, backend="reference"):
        eager = train(images, "step", depth=1)
        unet, recorder = graphed(images, compile="whole", backend="aot_eager")
        with unet.learning():
            ours = train(images, "step", depth=1, unet=unet)
    assert_close(ours, eager)
    assert recorder.replayed > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cuda_graphs": "prefix"}, "'prefix' needs a CUDA device, got cpu"),
        ({"cuda_graphs": "all", "policy": "auto", "device_type": "cuda"}, "checkpoint policy other than 'auto'"),
        ({"cuda_graphs": "prefix", "policy": "auto", "device_type": "cuda"}, "checkpoint policy other than 'auto'"),
        ({"cuda_graphs": "all", "policy": "segment:2", "device_type": "cuda"}, "got 'segment:2'"),
        ({"cuda_graphs": "all", "policy": "sac:conv", "device_type": "cuda"}, "replays single steps"),
        ({"compile": "blocks", "policy": "sac:attention+conv"}, "hides what is inside.* got 'sac:attention"),
        ({"compile": "whole", "policy": "offload:conv"}, "hides what is inside.* got 'offload:conv"),
        ({"compile": "whole", "policy": "step+block"}, "must be none, step, segment:k"),
        ({"compile": "blocks", "policy": "batched:2"}, "training's micro-batch, .* got 'batched:2'"),
        ({"compile": "whole", "policy": "batched:2"}, "training's micro-batch, .* got 'batched:2'"),
        ({"cuda_graphs": "all", "policy": "batched:2", "device_type": "cuda"}, "replays single.* got 'batched:2'"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    policy = options.get("policy", "none")
    plan = None if policy == "auto" else make_policy(policy).plan(4)
    switches = {"compile": "none", "cuda_graphs": "none", "device_type": "cpu", "policy": policy, **options}
    with pytest.raises(UserError, match=message):
        refuse_acceleration(**switches, plan=plan)


@pytest.mark.parametrize(
    ("policy", "compiled", "graphed"),
    [
        *((policy, {"blocks", "whole"}, {"all"}) for policy in ("none", "step", "last_k_live:2")),
        ("segment:2", {"blocks", "whole"}, set()),
        ("step+block", {"blocks"}, set()),
        *((policy, set(), set()) for policy in ("sac:conv", "offload:conv", "batched:2")),
    ],
)
def test_exactly_what_goes_together_is_not_refused(policy, compiled, graphed):
    plan = make_policy(policy).plan(4)

    def passes(**switches):
        try:
            refuse_acceleration(**{"compile": "none", "cuda_graphs": "none", **switches}, plan=plan, policy=policy)
        except UserError:
            return False
        return True

    switches = ("none", "prefix", "blocks", "whole")
    assert {one for one in switches if passes(compile=one, device_type="cpu")} == {"none", "prefix", *compiled}
    switches = ("none", "prefix", "all")
    assert {one for one in switches if passes(cuda_graphs=one, device_type="cuda")} == {"none", "prefix", *graphed}


def test_a_treatment_that_graphs_do_not_know_is_refused_where_it_is_met(images):
    unet, _ = graphed(images)
    with pytest.raises(UserError, match="replays single steps"):
        train(images, "sac:conv", unet=unet)


@pytest.mark.parametrize("switches", [{"compile": "prefix"}, {"cuda_graphs": "all"}])
def test_a_trained_unet_is_refused(images, switches):
    next(images.network.module.parameters()).requires_grad_()
    with pytest.raises(ValueError, match=r"the UNet must be frozen: .* would lose its gradient"):
        AcceleratedUNet(images.network.module, recorder=CpuRecorder(), **switches)
