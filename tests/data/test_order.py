"""Prompt order: permutations, independence of the world size, seeds."""

from collections import Counter
from itertools import pairwise

import pytest

from fastcraft.data.order import PromptOrder, prompt_at, sample_seed
from fastcraft.errors import UserError


@pytest.mark.parametrize("num_prompts", [1, 2, 3, 7, 256, 257, 1632])
@pytest.mark.parametrize("epoch", [0, 5])
def test_an_epoch_is_a_permutation(num_prompts, epoch):
    first = epoch * num_prompts
    seen = [prompt_at(num_prompts, index, 0) for index in range(first, first + num_prompts)]
    assert sorted(seen) == list(range(num_prompts))


def test_epochs_and_seeds_differ():
    def order(epoch, seed):
        return [prompt_at(100, 100 * epoch + i, seed) for i in range(100)]

    orders = [order(0, 0), order(1, 0), order(0, 1), order(1, 1), list(range(100))]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 15


def test_every_order_of_three_is_as_likely():
    counts = Counter(tuple(prompt_at(3, i, seed) for i in range(3)) for seed in range(1200))
    assert len(counts) == 6
    assert all(140 <= count <= 260 for count in counts.values()), counts  # 200 expected, sd 13


def test_neighbours_are_spread():
    order = [prompt_at(1000, i, 3) for i in range(1000)]
    positions = Counter(order[i] // 100 for i in range(100))
    assert all(2 <= positions[tenth] <= 22 for tenth in range(10)), positions
    assert sum(b == a + 1 for a, b in pairwise(order)) < 10


def test_ten_million_prompts_cost_nothing_to_order():
    assert len({prompt_at(10_000_000, index, 0) for index in range(9_999_000, 10_001_000)}) > 1990


def test_the_order_is_frozen():
    """A change of these numbers breaks the resume of every run there is."""
    assert [prompt_at(10, index, 0) for index in range(12)] == [2, 4, 1, 8, 5, 9, 0, 7, 3, 6, 0, 2]
    assert sample_seed(0, 0) == 1416181948923433291
    assert sample_seed(7, 123456789, 2) == 1294267132437683195


@pytest.mark.parametrize(("num_prompts", "index"), [(0, 0), (3, -1)])
def test_out_of_range(num_prompts, index):
    with pytest.raises(ValueError, match="need num_prompts >= 1 and index >= 0"):
        prompt_at(num_prompts, index, 0)


PROMPTS = [f"prompt {i}" for i in range(10)]


def global_batch(first, *, world_size, batch_size, accumulation):
    """Every sample of one optimiser step that starts at sample number ``first``, as a training loop asks for them."""
    order = PromptOrder(PROMPTS, seed=5)
    batches = [
        order.batch(first + micro_step * world_size * batch_size, rank, batch_size=batch_size)
        for micro_step in range(accumulation)
        for rank in range(world_size)
    ]
    assert all(len(batch) == batch_size for batch in batches)
    return [pair for batch in batches for pair in zip(batch.indices, batch.prompts, strict=True)]


@pytest.mark.parametrize("split", [(8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 1, 8), (1, 8, 1)], ids=str)
def test_a_step_sees_the_same_at_any_world_size(split):
    world_size, batch_size, accumulation = split
    for first in range(0, 32, 8):
        got = global_batch(first, world_size=world_size, batch_size=batch_size, accumulation=accumulation)
        assert got == global_batch(first, world_size=1, batch_size=8, accumulation=1)
        assert [index for index, _ in got] == list(range(first, first + 8))


def test_a_run_goes_on_at_another_batch_size():
    whole = global_batch(0, world_size=1, batch_size=32, accumulation=1)
    before = global_batch(0, world_size=2, batch_size=4, accumulation=1)
    after = global_batch(8, world_size=3, batch_size=4, accumulation=2)
    assert before + after == whole


def test_steps_run_through_the_epochs():
    steps = [global_batch(first, world_size=2, batch_size=2, accumulation=1) for first in range(0, 20, 4)]
    assert Counter(prompt for step in steps for _, prompt in step) == dict.fromkeys(PROMPTS, 2)


@pytest.mark.parametrize("change", [{"first": -1}, {"rank": -1}, {"batch_size": 0}])
def test_batch_out_of_range(change):
    good = {"first": 0, "rank": 0, "batch_size": 1}
    PromptOrder(PROMPTS, seed=0).batch(**good)
    with pytest.raises(ValueError, match=r"PromptOrder\.batch"):
        PromptOrder(PROMPTS, seed=0).batch(**{**good, **change})


def test_no_prompts():
    with pytest.raises(UserError, match="at least one is needed"):
        PromptOrder([], seed=0)


def test_sample_seeds_are_distinct_and_fit_a_generator():
    seeds = [sample_seed(run, index, stream) for run in range(3) for index in range(500) for stream in range(2)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sum(seed >> 62 for seed in seeds) == pytest.approx(len(seeds) / 2, rel=0.1), "all bits are used"
    assert sample_seed(1, 23) != sample_seed(12, 3), "arguments are kept apart"
