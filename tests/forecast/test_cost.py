"""What is counted of a piece of code, and how long that takes on a device."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fastcraft.forecast.cards import CARDS, SELECTIVE_SECONDS, cpu_card
from fastcraft.forecast.cost import Line, TrainedBytes, measure_step, static_bytes, work_seconds
from fastcraft.forecast.phases import hollow
from fastcraft.forecast.tracker import AllocationTracker, Op, Work


def test_fake_and_real_tensors_are_counted_alike():
    conv = nn.Conv2d(4, 8, 3).requires_grad_(False)
    rows = []
    for module, device in ((conv, "cpu"), (hollow(conv, "meta"), "meta")):
        x = torch.ones(1, 4, 16, 16, device=device)
        rows.append(measure_step(lambda x, m=module: m(x.sin()).relu(), x, weights=module.parameters()))
    assert rows[0] == rows[1]
    # the input of the convolution and the output of relu stay; sin keeps its input, which was there before
    assert rows[0].held == Line(each=4 * (4 * 16 * 16 + 8 * 14 * 14))
    assert rows[0].forward.flops == 2 * 8 * 14 * 14 * 4 * 9


def test_views_and_results_in_place_take_nothing():
    with AllocationTracker() as tracker:
        x = torch.zeros(1000)
        y = x.view(10, 100).t().add_(1)
        assert tracker.live == 4000
        del x, y
        assert (tracker.live, tracker.peak) == (0, 4000)


def test_inference_mode_hides_no_product():
    linear = nn.Linear(64, 32, bias=False).requires_grad_(False)
    with torch.inference_mode(), AllocationTracker(linear.parameters()) as tracker:
        linear(torch.ones(8, 64))
    assert tracker.work().flops == 2 * 8 * 64 * 32


def test_time_is_the_longest_of_product_traffic_and_launch():
    card = CARDS["a100-80g"]
    launch = work_seconds(Work(ops={Op("other", 0, 1, 0): 3}), card, dtype="bfloat16", samples=1)
    assert launch == pytest.approx(3 * card.launch_seconds)
    product = work_seconds(Work(ops={Op("conv", 10**12, 1, 0): 1}), card, dtype="bfloat16", samples=2)
    assert product == pytest.approx(2e12 / (312e12 * card.share("conv")))
    traffic = work_seconds(Work(ops={Op("other", 0, 10**9, 10**9): 1}), card, dtype="bfloat16", samples=3)
    assert traffic == pytest.approx(4e9 / (2039e9 * card.share("bandwidth")))


def test_the_hosts_time_is_hidden_on_a_card_and_comes_on_top_on_a_cpu():
    card, cpu = CARDS["a100-80g"], cpu_card(2**30)
    short = Work(ops={Op("other", 0, 10**9, 0): 10}, num_selected=100)
    hidden = work_seconds(replace(short, num_selected=0), card, dtype="bfloat16", samples=1)
    assert work_seconds(short, card, dtype="bfloat16", samples=1) == hidden > 100 * SELECTIVE_SECONDS
    long = replace(short, num_selected=10**6)
    host = 10**6 * SELECTIVE_SECONDS
    assert work_seconds(long, card, dtype="bfloat16", samples=1) == pytest.approx(host + 10 * card.launch_seconds)
    both = host + 10 * cpu.launch_seconds + 10 * 1e9 / cpu.bandwidth
    assert work_seconds(long, cpu, dtype="float32", samples=1) == pytest.approx(both)


def test_optimizer_state_is_shared_out_over_the_ranks():
    text = {"text": TrainedBytes(num_parameters=100)}
    one, update = static_bytes(frozen={"UNet": 7}, trained=text, max_bucket=50)
    assert one == {"UNet": 7, "trained weights, text": 400, "masters and moments": 1200, "gradient bucket": 200}
    assert update == 800
    assert static_bytes(frozen={}, trained=text, world_size=4, max_bucket=50)[0]["masters and moments"] == 300


def test_parts_are_added_up_and_bfloat16_weights_have_float32_masters():
    parts = {
        "text": TrainedBytes(num_parameters=100, itemsize=2),
        "unet": TrainedBytes(num_parameters=60, itemsize=2, num_averaged=60),
    }
    kinds, update = static_bytes(frozen={}, trained=parts, world_size=2, max_bucket=50)
    assert kinds == {
        "trained weights, text": 200, "trained weights, unet": 120, "masters and moments": 3 * 4 * 80, "averages": 120,
        "gradient bucket": 100,
    }  # fmt: skip
    assert update == 4 * 80  # gradients once: those of float32 weights are flattened once more
