"""What each treatment runs again, by the ops that backward dispatches; the same gradient under all of them."""

from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastcraft.diffusion.offload import offload_contexts
from fastcraft.diffusion.treatments import carry_out, is_one_of
from fastcraft.errors import UserError
from fastcraft.families.unet import UNetNetwork
from tests.diffusion.texts import condition

KINDS = ("attention", "conv", "linear", "norm")


class Count(TorchDispatchMode):
    """Forward ops by kind."""

    def __init__(self):
        super().__init__()
        self.ops = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.update(kind for kind in KINDS if is_one_of((kind,), func))
        return func(*args, **(kwargs or {}))


def step(unet, context_fn=None, treatment="keep"):
    """(ops of forward, ops of backward, gradient) of one denoising step; the backward's own products are taken off."""
    torch.manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, requires_grad=True)
    with torch.no_grad():
        text = condition(unet, torch.randn(1, 77, 32))

    def call(x):
        return UNetNetwork(module=unet).predict(x, torch.tensor(9), text, guided=False)

    with Count() as forward:
        if context_fn is None:
            out = carry_out(treatment, call, latents, module=unet)
        else:
            out = checkpoint(call, latents, use_reentrant=False, preserve_rng_state=False, context_fn=context_fn)
    with Count() as backward:
        out.square().sum().backward()
    return forward.ops, backward.ops, latents.grad


@pytest.fixture
def kept(tiny_parts):
    return step(tiny_parts.components.unet)


@pytest.mark.parametrize(
    ("treatment", "runs"),
    [
        ("recompute", {"attention": 1, "conv": 1, "linear": 1, "norm": 1}),
        ("recompute+block", {"attention": 2, "norm": 2}),
        ("sac:attention+conv", {"attention": 0, "conv": 0, "linear": 1, "norm": 1}),
        ("sac:linear", {"attention": 1, "conv": 1, "linear": 0, "norm": 1}),
        ("sac:attention+conv+linear+norm", {"attention": 0, "conv": 0, "linear": 0, "norm": 0}),
    ],
)
def test_what_is_run_again_in_backward(tiny_parts, kept, treatment, runs):
    forward, own, expected = kept
    assert all(forward[kind] > 3 for kind in KINDS)
    _, ops, gradient = step(tiny_parts.components.unet, treatment=treatment)
    assert torch.equal(gradient, expected)
    for kind, times in runs.items():
        again = ops[kind] - own[kind]
        # torch stops a recompute at the last tensor that is needed, and not every norm lies in a block
        least = times * forward[kind] - 1 if times < 2 else 1.7 * forward[kind]
        assert least <= again <= times * forward[kind], kind


def test_offloading_gives_the_same_gradient_and_recomputes_no_more_than_sac(tiny_parts, kept):
    """The bookkeeping on tensors of the CPU; the copies themselves are test_offload.py's."""
    unet, (_, own, expected) = tiny_parts.components.unet, kept
    matches = partial(is_one_of, ("attention", "conv"))
    _, ops, gradient = step(unet, context_fn=partial(offload_contexts, matches))
    assert torch.equal(gradient, expected)
    assert ops["attention"] == own["attention"]
    assert ops["conv"] == own["conv"]
    assert ops["norm"] > own["norm"]


def test_offloading_refuses_ops_that_change_between_the_passes():
    calls = []

    def fickle(x):
        calls.append(1)
        return (torch.mm(x, x) if len(calls) == 1 else F.linear(x, x, x[0])).sin()

    x = torch.randn(3, 3, requires_grad=True)
    contexts = partial(offload_contexts, partial(is_one_of, ("linear",)))
    out = checkpoint(fickle, x, use_reentrant=False, context_fn=contexts).sum()
    with pytest.raises(RuntimeError, match="is not what forward called at this point"):
        out.backward()


def test_offloading_on_a_cpu_is_refused(tiny_parts):
    with pytest.raises(UserError, match="'offload:conv' needs CUDA tensors, got cpu"):
        step(tiny_parts.components.unet, treatment="offload:conv")


def test_blocks_are_left_as_they_were(tiny_parts):
    unet = tiny_parts.components.unet
    flags = [module.gradient_checkpointing for module in unet.modules() if hasattr(module, "gradient_checkpointing")]
    step(unet, treatment="recompute+block")
    after = [module.gradient_checkpointing for module in unet.modules() if hasattr(module, "gradient_checkpointing")]
    assert after == flags
    assert not any(after)
    with pytest.raises(ValueError, match="Linear has no blocks that can be checkpointed"):
        carry_out("recompute+block", torch.sin, torch.ones(2, requires_grad=True), module=torch.nn.Linear(2, 2))


def test_fused_ops_obey_by_namespace_by_kind_and_by_name():
    """Whatever is registered as torch.ops.fastcraft.*: kept once, not run again."""
    runs = []

    @torch.library.custom_op("fastcraft::probe_norm_act", mutates_args=())
    def probe(x: torch.Tensor) -> torch.Tensor:
        runs.append(1)
        return torch.tanh(x)

    probe.register_autograd(
        lambda ctx, grad: grad * (1 - ctx.saved_tensors[0].square()),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output),
    )
    again = {}
    for treatment in ("sac:fastcraft", "sac:norm", "sac:probe_norm_act", "sac:conv", "recompute"):
        x = torch.linspace(-1, 1, 5, requires_grad=True)
        out = carry_out(treatment, lambda x: probe(x.sin()).sin(), x, module=torch.nn.Identity())
        before = len(runs)
        out.sum().backward()
        again[treatment] = len(runs) - before
    assert again == {"sac:fastcraft": 0, "sac:norm": 0, "sac:probe_norm_act": 0, "sac:conv": 1, "recompute": 1}
