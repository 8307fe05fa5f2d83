"""The head first: the gradient of the whole graph, whatever the loss, the rewards and the draws."""

from functools import partial

import pytest
import torch

from fastcraft.memory.policies import make_policy
from fastcraft.objectives.head import head_first
from fastcraft.records import RewardOutput
from fastcraft.rewards.base import Reward
from fastcraft.rewards.mix import WeightedRewards
from tests.objectives.build import batch_of, flat, gradients_of, one_loss

PROMPTS = ["a", "bb", "ccc", "dddd", "eeeee"]


class Curve(Reward):
    """Different for every picture and prompt, curved."""

    name, uses_prompt, score_range = "curve", True, "any"

    def __init__(self, frequency):
        super().__init__()
        self.frequency = frequency

    def forward(self, images, prompts):
        lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
        return (images * self.frequency).sin().flatten(1).mean(1) * lengths


def mix(normalize="none"):
    return WeightedRewards([("slow", Curve(1.0), 2.0), ("fast", Curve(5.0), -0.5)], normalize=normalize)


class Toy:
    """An image model of one matrix: text embedding -> latents -> pictures, to see gradients without a UNet."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(48, 6, generator=generator, dtype=torch.float64).float()
        self.inputs = torch.randn(5, 6, generator=generator)
        self.text = torch.ones(6, requires_grad=True)

    def latents(self):
        return (self.inputs * self.text).sin()

    def decode(self, latents):
        return (latents @ self.weight.T).sigmoid().unflatten(1, (3, 4, 4))


@pytest.mark.parametrize("normalize", ["none", "running_std"])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize(
    "penalty", [lambda total: -total, lambda total: torch.relu(3.0 - total)], ids=["mean", "hinge"]
)
def test_the_gradient_is_that_of_the_whole_batch(normalize, micro_batch, penalty):
    toy, whole, parts = Toy(), mix(normalize), mix(normalize)
    for rewards in (whole, parts):  # some history, so that the divisors are not those of this batch alone
        rewards(torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(1)), PROMPTS[:3], update_statistics=True)
    total = whole(toy.decode(toy.latents()), PROMPTS)
    loss = penalty(total.total).mean()
    (expected,) = torch.autograd.grad(loss, toy.text)

    head = head_first(
        toy.latents(), PROMPTS, decode=toy.decode, rewards=parts, loss=lambda t: penalty(t).sum() / 5,
        micro_batch=micro_batch,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(head.loss * 0.5, toy.text)  # as an engine scales for accumulation
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(2 * gradient, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(head.loss.detach(), loss.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(head.output.total, total.total.detach(), rtol=1e-6, atol=1e-7)
    assert {name: part.tolist() for name, part in head.output.parts.items()} == {
        name: pytest.approx(part.tolist(), rel=1e-6) for name, part in total.parts.items()
    }
    for name, values in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], values, rtol=1e-12, atol=1e-12)


def test_statistics_take_every_score_once():
    toy, rewards = Toy(), mix("running_std")
    head_first(toy.latents(), PROMPTS, decode=toy.decode, rewards=rewards, loss=lambda t: t.sum(), micro_batch=2)
    rewards.synchronize()
    assert [values[0].item() for values in rewards.state_dict().values()] == [5.0, 5.0]


def test_only_a_part_of_the_head_is_alive_at_a_time():
    toy, alive, most = Toy(), [0], [0]

    class Held:
        def __init__(self, tensor):
            self.tensor = tensor
            alive[0] += tensor.nbytes
            most[0] = max(most[0], alive[0])

        def __del__(self):
            alive[0] -= self.tensor.nbytes

    def saved_at_most(micro_batch):
        most[0] = 0
        latents = toy.latents()
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            head_first(latents, PROMPTS, decode=toy.decode, rewards=mix(), loss=torch.sum, micro_batch=micro_batch)
        return most[0]

    assert saved_at_most(1) < saved_at_most(5) / 2


def test_a_gradient_that_is_not_finite_reaches_the_encoder():
    """So that the engine sees it and skips the step."""
    toy = Toy()

    def broken(images, prompts):
        total = images.flatten(1).sum(1) / torch.tensor([1.0 if len(prompt) != 3 else 0.0 for prompt in prompts])
        return RewardOutput(total=total, parts={"broken": total})

    head = head_first(toy.latents(), PROMPTS, decode=toy.decode, rewards=broken, loss=torch.sum, micro_batch=2)
    assert not head.loss.isfinite()
    assert not torch.autograd.grad(head.loss, toy.text)[0].isfinite().all()


@pytest.mark.parametrize(
    "settings",
    [
        {"backprop_steps": 2},
        {"backprop_steps": 2, "loss": "hinge", "hinge_margin": 2000.0, "loss_scale": 0.1},
        {"backprop_steps": 1, "low_variance_draws": 3},
        {"backprop_steps": 2, "anchor_weight": 5.0},
        {"backprop_steps": 2, "truncation": "single", "prefix_by": "trained"},
    ],
    ids=["textcraftor", "hinge", "low-variance", "anchor", "refl"],
)
def test_every_method_gives_the_same_gradient_with_the_head_first(tiny_objective, settings):
    built = tiny_objective(**settings)
    built.objective.batches = batch_of(["a red cat", "a blue dog", "a cat"], [4, 5, 6])
    results = []
    for micro_batch in (0, 2):
        built.objective.make_plan = partial(make_policy("step").plan, decode_micro_batch=micro_batch)
        built.trained.zero_grad()
        output = one_loss(built.objective, draw=1)
        output.loss.backward()
        results.append((output, flat(gradients_of(built.trained))))
    (whole, expected), (parts, gradient) = results
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-5, atol=1e-7)
    assert parts.metrics.keys() == whole.metrics.keys()
    for name, value in whole.metrics.items():
        torch.testing.assert_close(parts.metrics[name], value, rtol=1e-5, atol=1e-6)
    assert expected.norm() > 1e-4
    assert torch.cosine_similarity(gradient, expected, dim=0) > 1 - 1e-7
    torch.testing.assert_close(gradient.norm(), expected.norm(), rtol=1e-4, atol=0)
