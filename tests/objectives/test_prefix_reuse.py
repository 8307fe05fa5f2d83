"""Reused prefixes: the gradient of a fresh one to the bit, and refusals where it would not be."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastcraft.build.run import build_order
from fastcraft.config import recipe_from_tree
from fastcraft.data.order import PromptOrder, reused_index
from fastcraft.diffusion.prefix_store import MemoryStore, Prefixes
from fastcraft.errors import UserError
from tests.objectives.build import flat, gradients_of, one_loss


def gradients(objective, trained):
    trained.zero_grad()
    output = one_loss(objective)
    output.loss.backward()
    return replace(output, loss=output.loss.detach()), flat(gradients_of(trained))


@pytest.mark.parametrize("settings", [{"backprop_steps": 2}, {"backprop_steps": 1, "low_variance_draws": 2}])
def test_a_reused_prefix_gives_the_bits_of_a_fresh_one(tiny_objective, settings):
    built = tiny_objective(prefixes=Prefixes(store=MemoryStore(max_bytes=2**20), context=""), **settings)
    objective, trained, calls = built.objective, built.trained, []
    objective.model.network.module.register_forward_hook(lambda *args: calls.append(1))
    output, fresh = gradients(objective, trained)
    num_fresh, calls[:] = len(calls), []
    again, reused = gradients(objective, trained)
    assert torch.equal(reused, fresh)
    assert torch.equal(again.loss, output.loss)
    assert (output.metrics["prefix_reused"], again.metrics["prefix_reused"]) == (0, 1)
    assert num_fresh - len(calls) == 4 - settings["backprop_steps"]
    with torch.no_grad():
        for parameter in built.text.parameters():
            parameter.mul_(1.01)
    moved, _ = gradients(objective, trained)
    assert moved.loss != output.loss  # the frozen steps are reused, the steps with gradient are not
    objective.prefixes = None
    assert torch.equal(gradients(objective, trained)[0].loss, moved.loss)


def test_each_pair_comes_back_as_often_as_asked():
    order = PromptOrder([f"p{i}" for i in range(40)], seed=1, reuse=3, pool=8)
    plain = PromptOrder(order.prompts, seed=1)
    batches = [order.batch(first, 0, batch_size=4) for first in range(0, 48, 4)]
    pool = [plain.batch(first, 0, batch_size=4) for first in (0, 4)]
    assert batches[:6] == pool * 3
    assert batches[6:] == [plain.batch(first, 0, batch_size=4) for first in (8, 12)] * 3
    assert [reused_index(i, reuse=1, pool=8) for i in range(20)] == list(range(20))


def recipe(**memory):
    sections = {key: memory.pop(key) for key in ("text", "objective", "train") if key in memory}
    return recipe_from_tree({"rewards": [{"name": "brightness"}], "memory": memory, **sections})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"prefix_reuse": 0}, "memory.prefix_reuse must be at least 1, got 0"),
        ({"prefix_store": ""}, "memory.prefix_store must be 'memory' or a folder"),
        (
            {"prefix_reuse": 2, "text": {"prefix_encoder": "trained"}},
            "memory.prefix_reuse above 1 needs text.prefix_encoder = 'original': what the trained",
        ),
        (
            {"prefix_store": "/tmp/x", "text": {"prefix_encoder": "trained"}},
            "a folder as memory.prefix_store needs text.prefix_encoder = 'original'",
        ),
        ({"prefix_reuse": 2, "objective": {"truncation": "single"}}, "needs objective.truncation = 'last'"),
        ({"prefix_reuse": 2, "objective": {"backprop_steps": 25}}, "needs frozen steps"),
    ],
)
def test_reuse_is_refused_where_the_prefix_is_not_a_fixed_function(tree, message):
    with pytest.raises(UserError, match=message):
        recipe(**tree)


PROMPTS, IMAGES = ("a", "b"), SimpleNamespace(latent_shape=(4, 64, 64))


@pytest.mark.parametrize(
    ("memory", "world_size", "message"),
    [
        ({"prefix_pool": 1000}, 3, r"must be a multiple of train.batch_size x ranks \(4 x 3\), got 1000"),
        (
            {"prefix_pool": 4096, "prefix_store_mib": 100},
            1,
            "must hold the 4096 latents of the pool, at least 258, got 100",
        ),
        ({"prefix_pool": 4096, "prefix_store_mib": 100}, 2, "must hold the 2048 latents of the pool, at least 129"),
    ],
)
def test_a_pool_that_cannot_be_served_is_refused(memory, world_size, message):
    with pytest.raises(UserError, match=message):
        build_order(recipe(prefix_reuse=2, **memory), PROMPTS, IMAGES, world_size=world_size)


def test_without_reuse_the_pool_does_not_matter():
    assert build_order(recipe(prefix_pool=7), PROMPTS, IMAGES, world_size=3).reuse == 1
