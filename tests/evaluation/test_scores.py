"""Means, their errors, and before against after."""

import math

import pytest
import torch

from fastcraft.errors import UserError
from fastcraft.evaluation.scores import compare, evaluate_pictures, score_pictures, summarize
from fastcraft.records import RewardOutput


class Brightness:
    """Scores that name their picture and prompt, so that any mix-up shows."""

    def __init__(self):
        self.sizes = []

    def __call__(self, images, prompts):
        self.sizes.append(len(images))
        bright = images.mean(dim=(1, 2, 3)) * len(prompts[0])
        return RewardOutput(total=2 * bright, parts={"bright": bright})


IMAGES = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])[:, None, None, None].expand(5, 3, 4, 4).clone().requires_grad_()


def test_rewards_go_in_micro_batches_and_the_exam_sees_all():
    rewards, seen = Brightness(), []

    def exam(images, prompts):
        seen.append((len(images), prompts))
        return {"fully_right": 0.5, "color": torch.tensor(0.25)}

    table = evaluate_pictures(IMAGES, list("abcde"), rewards=rewards, exam=exam, micro_batch=2)
    assert rewards.sizes == [2, 2, 1]
    assert seen == [(5, list("abcde"))]
    error = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).std().item() / math.sqrt(5)
    expected = {
        "reward/total": 1.0,
        "reward_se/total": 2 * error,
        "reward/bright": 0.5,
        "reward_se/bright": error,
        "fully_right": 0.5,
        "color": 0.25,
    }
    assert table == pytest.approx(expected)
    assert list(table) == list(expected)


def test_scores_keep_the_order_of_the_pictures_and_carry_no_graph():
    scores = score_pictures(IMAGES, ["a"] * 5, rewards=Brightness(), micro_batch=3)
    assert scores["bright"].tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert not scores["bright"].requires_grad


@pytest.mark.parametrize("figures", [{"reward/total": 1.0}, {"color": "red"}, {"color": None}], ids=str)
def test_an_exam_that_breaks_the_rules_is_refused(figures):
    with pytest.raises(UserError, match=r"an exam must"):
        evaluate_pictures(IMAGES, ["a"] * 5, exam=lambda *_: figures, micro_batch=2)


def test_counts_must_agree():
    with pytest.raises(ValueError, match="one for each of the 5 images, got 1"):
        evaluate_pictures(IMAGES, ["a"], rewards=Brightness(), micro_batch=2)
    with pytest.raises(ValueError, match="micro_batch"):
        evaluate_pictures(IMAGES, ["a"] * 5, rewards=Brightness(), micro_batch=0)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for trial in range(200):
        summary = summarize(torch.randn(50, generator=generator) + 3, num_resamples=200, seed=trial)
        hits += summary.low <= 3 <= summary.high
    assert 178 <= hits <= 199  # 190 expected; the percentile bootstrap runs a little short


def test_summary_of_one_and_of_nan():
    one = summarize(torch.tensor([2.0]))
    assert (one.mean, one.low, one.high, one.count) == (2.0, 2.0, 2.0, 1)
    assert math.isnan(one.standard_error)
    assert math.isnan(summarize(torch.tensor([1.0, math.nan])).mean)
    with pytest.raises(ValueError, match="at least one"):
        summarize(torch.empty(0))


def test_compare_joins_errors_and_keeps_what_one_side_lacks():
    before = {"reward/total": 1.0, "reward_se/total": 0.1, "old": 2.0, "broken": math.nan}
    after = {"reward/total": 1.5, "reward_se/total": 0.2, "new": 3.0, "broken": 1.0}
    rows = {row.name: row for row in compare(before, after)}
    assert list(rows) == ["reward/total", "old", "broken", "new"]
    assert rows["reward/total"].difference == 0.5
    assert (rows["reward/total"].before_se, rows["reward/total"].after_se) == (0.1, 0.2)
    assert (rows["old"].after, rows["old"].difference) == (None, None)
    assert (rows["broken"].before, rows["broken"].difference) == (None, None)
    assert rows["new"].before is None
