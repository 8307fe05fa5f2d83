"""The planner: least time that fits, against trying everything; what it says when nothing fits; the way down."""

import itertools
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastcraft.forecast.architectures import towers_of
from fastcraft.forecast.auto import card_of, planner_of
from fastcraft.forecast.cards import CARDS, find_card, parse_bytes
from fastcraft.forecast.cost import Cost, Line
from fastcraft.forecast.estimate import StepEstimate
from fastcraft.forecast.planner import AutoPlan, DoesNotFitError, Planner
from fastcraft.forecast.tracker import Op, Work
from fastcraft.memory.plan import KEEP, RECOMPUTE, CheckpointPlan

MIB = 2**20
SAC = "sac:attention+conv"


def cost(held, extra, flops, *, first=None):
    """Bytes in MiB for each sample, FLOPs in T; a forward of a third of the FLOPs."""
    return Cost(
        held=Line(each=held * MIB),
        forward_peak=Line(each=(held + 10) * MIB),
        backward_extra=Line(each=extra * MIB),
        first_held=None if first is None else Line(each=first * MIB),
        forward=Work(ops={Op("conv", int(flops * 1e12 / 3), 0, 0): 1}),
        backward=Work(ops={Op("conv", int(flops * 2e12 / 3), 0, 0): 1}),
    )


@pytest.fixture
def estimate():
    return StepEstimate(
        model="invented", dtype="bfloat16", resolution=512, guided=True, static={"UNet": 100 * MIB},
        update_bytes=50 * MIB, text=cost(20, 30, 0.1), kv_bytes=Line(each=5 * MIB), prefix=cost(0, 0, 1.5),
        steps={KEEP: cost(1000, 50, 3.6, first=900), SAC: cost(300, 800, 4.1), RECOMPUTE: cost(1, 1100, 5.2)},
        heads={KEEP: cost(2000, 100, 5.0), RECOMPUTE: cost(100, 2000, 7.5)},
    )  # fmt: skip


def planner(estimate, mib, **options):
    options = {"num_inference_steps": 10, "budget_bytes": mib * MIB, **options}
    return Planner(estimate, CARDS["a100-80g"], **options)


def everything(estimate, depth, batch):
    """Every plan there is, in every order, as (seconds, peak bytes)."""
    found = planner(estimate, 0)
    for steps in itertools.product(estimate.steps, repeat=depth):
        for decode, chunk in itertools.product(estimate.heads, range(1, batch + 1)):
            plan = CheckpointPlan(steps=steps, decode=decode, decode_micro_batch=chunk)
            choice = found.weigh(plan, batch_size=batch)
            yield choice.seconds, choice.peak_bytes


@pytest.mark.parametrize("batch", [1, 3])
def test_close_to_the_best_of_all_plans_at_every_budget(estimate, batch):
    best = sorted(everything(estimate, 4, batch))
    for mib in range(2000, 20000, 700):
        fitting = [seconds for seconds, peak in best if peak <= mib * MIB]
        if not fitting:
            with pytest.raises(DoesNotFitError):
                planner(estimate, mib).choose(4, batch_sizes=[batch])
            continue
        choice = planner(estimate, mib).choose(4, batch_sizes=[batch])
        assert choice.peak_bytes <= mib * MIB
        assert choice.seconds <= 1.05 * fitting[0], mib


@pytest.mark.parametrize("input_grad", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3, 7])
def test_the_closed_form_is_the_prediction(estimate, depth, input_grad):
    found = planner(estimate, 0, input_grad=input_grad)
    for batch in (1, 4):
        for choice in found.frontier(depth, batch_size=batch):
            full = found.predict(choice)
            assert (choice.peak_bytes, choice.seconds) == (full.peak_bytes, pytest.approx(full.seconds))


def test_a_frontier_has_nothing_that_another_choice_beats(estimate):
    front = planner(estimate, 0).frontier(6, batch_size=2)
    assert len(front) > 5
    for faster, smaller in itertools.pairwise(front):
        assert faster.seconds <= smaller.seconds
        assert faster.peak_bytes > smaller.peak_bytes


def test_plenty_keeps_everything_and_little_recomputes(estimate):
    assert set(planner(estimate, 99999).choose(5, batch_sizes=[1]).plan.steps) == {KEEP}
    least = planner(estimate, 0).frontier(5, batch_size=1)[-1]
    assert set(least.plan.steps) == {RECOMPUTE}


def test_depth_50_takes_hardly_more_than_depth_1_when_it_must(estimate):
    one, fifty = (planner(estimate, 0).frontier(depth, batch_size=1)[-1].peak_bytes for depth in (1, 50))
    assert fifty <= 1.1 * one


def test_heavy_steps_come_last(estimate):
    steps = planner(estimate, 6000).choose(5, batch_sizes=[1]).plan.steps
    assert len(set(steps)) == 2
    held = [estimate.steps[name].held.each for name in steps]
    assert held == sorted(held)


def test_independent_steps_are_batched_where_starting_ops_is_what_takes_time(estimate):
    def starts(step, *numbers):
        forward, backward = (Work(ops={Op("conv", 1, 0, 0): number}) for number in numbers)
        return replace(step, forward=forward, backward=backward)

    steps = {KEEP: starts(estimate.steps[KEEP], 1000, 1000), RECOMPUTE: starts(estimate.steps[RECOMPUTE], 1000, 2000)}
    bound = replace(estimate, steps=steps)
    alone = planner(bound, 99999).choose(7, batch_sizes=[1])
    assert set(alone.plan.steps) == {KEEP}
    together = planner(bound, 99999, input_grad=False).choose(7, batch_sizes=[1])
    assert "7 recompute in batches of 7" in together.describe()
    assert planner(bound, 99999, input_grad=False, batches=False).choose(7, batch_sizes=[1]).plan == alone.plan
    less = planner(bound, 5500, input_grad=False).choose(7, batch_sizes=[1])
    assert less.plan.batched == 4  # two calls, and no more steps in either than it takes
    assert alone.seconds > less.seconds > together.seconds
    assert less.peak_bytes <= 5500 * MIB < together.peak_bytes


def test_steps_are_not_batched_where_only_their_own_size_is_compiled(estimate):
    estimate = replace(estimate, steps={RECOMPUTE: cost(1, 1100, 1e-6)})
    for batches in (True, False):
        found = planner(estimate, 99999, input_grad=False, batches=batches).frontier(6, batch_size=1)
        assert any(choice.plan.batched for choice in found) == batches


def test_weights_that_are_frozen_into_code_count_once_more(estimate, monkeypatch):
    monkeypatch.setattr("fastcraft.forecast.auto.cached_estimate", lambda networks, **options: estimate)
    options = {"guided": True, "uncond_trained": True, "num_inference_steps": 10, "input_grad": True}
    peaks = [
        planner_of(None, device=torch.device("cpu"), budget_gib=99, unet_copies=copies, **options)
        .choose(4, batch_sizes=[1])
        .peak_bytes
        for copies in (0, 1)
    ]
    assert peaks[1] - peaks[0] == 100 * MIB


@pytest.mark.parametrize(
    ("ranks", "share"), [({}, 2), ({"LOCAL_WORLD_SIZE": "4"}, 8), ({"LOCAL_SIZE": "8"}, 16)],
    ids=["alone", "torchrun", "deepspeed"],
)  # fmt: skip
def test_ranks_of_one_machine_share_what_they_may_pin(monkeypatch, ranks, share):
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, number in ranks.items():
        monkeypatch.setenv(name, number)
    found = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=2**36)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: found)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**40))
    card = card_of(torch.device("cuda"))
    assert (card.memory_bytes, card.host_bytes) == (2**36, 2**40 // share)
    assert card.matmul_flops == CARDS["h100"].matmul_flops


def test_offloading_where_the_host_has_room_and_its_link_is_fast(estimate):
    sac, again, host = estimate.steps[SAC], estimate.steps[RECOMPUTE], Line(each=299 * MIB)
    moved = replace(
        sac, held=again.held, backward_extra=again.backward_extra, host=host,
        forward=replace(sac.forward, copied_bytes=host.each), again=Work(ops={}, copied_bytes=host.each),
    )  # fmt: skip
    there = replace(estimate, steps={**estimate.steps, "offload:attention+conv": moved})
    card = replace(CARDS["a100-80g"], host_bandwidth=1e12, host_bytes=20 * 299 * MIB)

    def steps(depth, card):
        options = {"num_inference_steps": 60, "budget_bytes": 4000 * MIB}
        return Counter(Planner(there, card, **options).choose(depth, batch_sizes=[1]).plan.steps)

    assert steps(20, card) == {"offload:attention+conv": 19, KEEP: 1}
    assert 0 < steps(30, card)["offload:attention+conv"] <= 20
    for without in (replace(card, host_bandwidth=0.0), replace(card, host_bandwidth=1e6), replace(card, host_bytes=0)):
        assert not steps(20, without)["offload:attention+conv"]


def test_batching_gains_nothing_where_products_are_what_takes_time(estimate):
    found = planner(estimate, 0, input_grad=False).frontier(6, batch_size=2)
    assert not any(choice.plan.batched for choice in found)


def test_the_batch_with_the_most_samples_per_second(estimate):
    found = planner(estimate, 8000)
    best = found.choose(5)
    for size in (1, 2, 3, 4, 6):
        assert best.samples_per_sec >= found.choose(5, batch_sizes=[size]).samples_per_sec


def test_a_fixed_decode_batch_is_kept(estimate):
    assert planner(estimate, 99999, decode_micro_batch=2).choose(2, batch_sizes=[6]).plan.decode_micro_batch == 2


def test_says_what_is_missing_and_what_would_fit(estimate):
    with pytest.raises(DoesNotFitError) as error:
        planner(estimate, 2500).choose(5, batch_sizes=[4])
    message = str(error.value)
    assert "batch 4 at depth 5 takes at least" in message
    assert "the budget is 2.44 GiB, short by" in message
    assert "batch 2 would fit here; it would fit a100-40g, a100-80g, h100, h200, 4090" in message


def test_after_an_out_of_memory_error_the_next_plan_takes_less(estimate):
    auto = AutoPlan(planner(estimate, 99999), batch_size=1)
    before = auto.choose(5)
    seen = [before.peak_bytes]
    while (note := auto.fall_back(5)) is not None:
        assert note.startswith("out of memory under ")
        assert auto.choose(5).peak_bytes <= 0.9 * seen[-1]
        seen.append(auto.choose(5).peak_bytes)
    assert len(seen) > 2
    assert auto.plan(5).steps == (RECOMPUTE,) * 5  # the last one stays


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * 2**30), ("512 MiB", 2**29), ("80e9", 80 * 10**9), ("1.5gb", 1500000000), ("12", 12)],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size
    assert find_card(text).budget_bytes == size


def test_cards_by_name():
    assert find_card(" A100-80G ") is CARDS["a100-80g"]
    assert CARDS["a100-40g"].budget_bytes < CARDS["a100-80g"].budget_bytes < CARDS["h200"].budget_bytes
    with pytest.raises(ValueError, match="--device: expected a card or a size such as 24GiB, got 'a100-80'; did you"):
        find_card("a100-80")


def test_rewards_that_share_weights_share_a_tower():
    assert len(towers_of(["clip", "aesthetic"])) == 1
    assert len(towers_of(["pickscore", "hpsv2"])) == 2
    with pytest.raises(ValueError, match="no architecture known for 'hpsv3'; did you mean 'hpsv2'"):
        towers_of(["hpsv3"])
