"""Gradients of all denoising steps meet in float32 at the text's keys, however the steps are run."""

import logging
from dataclasses import replace

import pytest
import torch

from fastcraft.diffusion import fused_attention
from fastcraft.diffusion.offload import offload_contexts
from fastcraft.diffusion.patch import Patch
from fastcraft.diffusion.samplers.ddim import ddim
from fastcraft.diffusion.schedule import NoiseSchedule
from fastcraft.diffusion.unroll import denoise
from fastcraft.families.unet import UNetNetwork, use_text_kv
from fastcraft.memory.policies import POLICIES, make_policy
from fastcraft.objectives.head import head_first
from fastcraft.records import RewardOutput, Trajectory
from tests.diffusion.narrow_models import make_smallest
from tests.diffusion.texts import condition

LAST_FIVE = Trajectory(num_steps=6, grad_steps=(1, 2, 3, 4, 5))
MIXED = "plan:recompute,keep,recompute+block,recompute,keep"  # no "sac:", of which PyTorch allows one pass only
RUNNABLE = (
    "none", "step", "step+block", "sac:attention+conv", "sac:cross_attention", "segment:2", "last_k_live:2", MIXED,
)  # fmt: skip


@pytest.fixture
def unet():
    torch.manual_seed(1)
    unet = make_smallest()
    use_text_kv(unet)
    with torch.no_grad():  # gradients to the text well above rounding
        for path, parameter in unet.named_parameters():
            if "attn2" in path and path.endswith("weight"):
                parameter.mul_(3)
    with Patch(unet, backend="reference"):
        yield unet


class Run:
    """Two prompts, guided, six steps; ``gathered`` False leaves the sum over the steps to autograd."""

    def __init__(self, unet, *, gathered=True, dtype=torch.float32, guidance_scale=3.0):
        self.unet, self.gathered, self.guidance_scale = unet.to(dtype), gathered, guidance_scale
        schedule = NoiseSchedule(alphas_cumprod=(0.95, 0.9, 0.8, 0.7, 0.5, 0.3), final_alpha_cumprod=1.0)
        self.sampler = ddim(schedule, num_inference_steps=6)
        generator = torch.Generator().manual_seed(2)
        self.noise = torch.randn(2, 4, 4, 4, generator=generator)
        self.text = [torch.randn(n, 7, 8, generator=generator).to(dtype).requires_grad_() for n in (2, 1)]

    def project(self):
        conditioning = condition(self.unet, self.text[0], self.text[1] if self.guidance_scale != 1 else None)
        assert conditioning.sums.keys() == conditioning.layers.keys()
        return conditioning if self.gathered else replace(conditioning, sums={})

    def latents(self, conditioning, *, policy="none", trajectory=LAST_FIVE, start=None):
        return denoise(
            UNetNetwork(module=self.unet), self.noise if start is None else start, conditioning,
            sampler=self.sampler, guidance_scale=self.guidance_scale, trajectory=trajectory,
            plan=make_policy(policy).plan(len(trajectory.grad_steps)), start=0 if start is None else 5,
        )  # fmt: skip

    def grad(self, loss, **options):
        return torch.autograd.grad(loss, self.text if self.guidance_scale != 1 else self.text[:1], **options)


def score(latents):
    return (latents * torch.linspace(-1, 1, latents.numel()).view(latents.shape)).sum()


def policies(run):
    """Every policy gives the bits of keeping everything."""
    want = run.grad(score(run.latents(run.project())))
    for policy in RUNNABLE if run.gathered else ():
        grads = run.grad(score(run.latents(run.project(), policy=policy)))
        assert all(torch.equal(a, b) for a, b in zip(grads, want, strict=True)), policy
    return want


def two_passes(run):
    loss = score(run.latents(run.project(), policy=MIXED))
    first = run.grad(loss, retain_graph=True)
    second = run.grad(loss)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return second


def parts_of_the_loss_one_by_one(run):
    """A loss of two parts, a pass each over the steps' shared graph; one pass that never reaches the text."""
    start = run.noise.clone().requires_grad_()
    latents = run.latents(run.project(), trajectory=Trajectory(num_steps=6, grad_steps=(5,)), start=start)
    losses = (score(latents[:1]), score(latents[1:].square()))
    torch.autograd.grad(losses[0], start, retain_graph=True)
    first = run.grad(losses[0], retain_graph=True)
    return [a + b for a, b in zip(first, run.grad(losses[1]), strict=True)]


def accumulated(run):
    for _ in range(2):
        score(run.latents(run.project(), policy="step")).backward()
    return [text.grad for text in run.text]


def head_taken_first(run):
    end = run.latents(run.project(), policy="segment:3")
    head = head_first(
        end, ["a", "b"], decode=torch.tanh, micro_batch=1, loss=lambda total: -total.sum(),
        rewards=lambda images, prompts: RewardOutput(total=images.square().mean(dim=(1, 2, 3)), parts={}),
    )  # fmt: skip
    return run.grad(head.loss)


def steps_without_gradient_between(run):
    trajectory = Trajectory(num_steps=6, grad_steps=(1, 4), input_grad=False, row_starts=(1, 4))
    return run.grad(score(run.latents(run.project(), policy="segment:2", trajectory=trajectory)))


def batches_of_steps(run):
    """Several steps go backward in one call, on copies of the text, which autograd adds up."""
    trajectory = Trajectory(num_steps=6, grad_steps=(1, 2, 3, 4, 5), input_grad=False)
    alone, batched = (
        run.grad(score(run.latents(run.project(), policy=policy, trajectory=trajectory)))
        for policy in ("none", "batched:2")
    )
    for got, want in zip(batched, alone, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * want.abs().max().item())
    return batched


def several_ends(run):
    """DRaFT-LV's extra draws: branches of the graph that meet at the text."""
    conditioning = run.project()
    last = Trajectory(num_steps=6, grad_steps=(5,))
    ends = [run.latents(conditioning, policy="step")]
    ends += [run.latents(conditioning, trajectory=last, start=ends[0].detach() + 0.1 * i) for i in range(2)]
    return run.grad(sum(score(end) for end in ends))


SCENARIOS = [
    policies, two_passes, parts_of_the_loss_one_by_one, accumulated, head_taken_first, steps_without_gradient_between,
    batches_of_steps, several_ends,
]  # fmt: skip


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda x: x.__name__)
def test_gradients_are_those_of_autograd(unet, scenario):
    for got, want in zip(
        scenario(Run(unet, dtype=torch.float64)), scenario(Run(unet, gathered=False, dtype=torch.float64)), strict=True
    ):
        assert want.abs().max() > 1e-4
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_every_step_adds_to_the_sums_and_sends_nothing_else(unet):
    run = Run(unet)
    conditioning = run.project()
    sent = torch.autograd.grad(score(run.latents(conditioning, policy=MIXED)), conditioning.flat(), allow_unused=True)
    assert all(gradient is None for gradient in sent)
    assert all(total.abs().max() > 0 for pair in conditioning.sums.values() for total in pair)


def test_no_policy_is_forgotten():
    """Offloading needs a GPU, but for what it does to ops; batches have a scenario."""
    names = {name.partition(":")[0] for name in RUNNABLE}
    assert names | {"offload", "batched"} == set(POLICIES.names())


@pytest.mark.parametrize(("dtype", "guidance_scale"), [(torch.float32, 1.0), (torch.bfloat16, 3.0)], ids=str)
def test_every_policy_gives_the_same_bits(unet, dtype, guidance_scale):
    policies(Run(unet, dtype=dtype, guidance_scale=guidance_scale))


def test_offloading_leaves_the_sums_alone(unet, monkeypatch):
    monkeypatch.setattr("fastcraft.diffusion.treatments._sac_contexts", offload_contexts)
    run = Run(unet)
    want = run.grad(score(run.latents(run.project())))
    got = run.grad(score(run.latents(run.project(), policy="sac:cross_attention+conv")))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_there_are_no_sums_where_no_gradient_is_computed(unet):
    run = Run(unet)
    with torch.no_grad():
        assert not condition(unet, *run.text).sums
    assert not condition(unet, *(text.detach() for text in run.text)).sums
    conditioning = run.project()
    assert conditioning.sums
    assert not conditioning.detach().sums
    assert conditioning.unflatten(conditioning.flat()).sums == conditioning.sums  # the very tensors of the sums
    assert not conditioning.unflatten([tensor.clone() for tensor in conditioning.flat()]).sums
    assert not conditioning.repeat(2, num_samples=2).sums


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the tracer looks at every input's
def test_a_compiled_network_leaves_the_sum_to_autograd_and_says_so(unet, caplog):
    fused_attention._say.cache_clear()
    run, last = Run(unet), Trajectory(num_steps=6, grad_steps=(5,))

    def two_steps(conditioning):
        ends = [run.latents(conditioning, trajectory=last, start=run.noise * scale) for scale in (1, 2)]
        return run.grad(score(sum(ends)))

    conditioning, want = run.project(), two_steps(run.project())
    run.unet = torch.compile(unet, backend="aot_eager", fullgraph=True)
    with caplog.at_level(logging.WARNING):
        got = two_steps(conditioning)
    for ours, expected in zip(got, want, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert [record.message for record in caplog.records if "in a graph of torch.compile" in record.message]
