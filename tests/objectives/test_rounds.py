"""A round of reward back-propagation: one update from several micro-batches, and where it goes on from."""

import pytest
import torch

from tests.objectives.build import INDICES, PROMPTS, batch_of, one_loss


@pytest.fixture
def make(tiny_objective):
    def rounds():
        """An objective of three micro-batches of two samples, and the first samples that it asked for."""
        objective, asked = tiny_objective(backprop_steps=1).objective, []
        batch = batch_of(PROMPTS, INDICES)
        objective.batches = lambda first: asked.append(first) or batch(first)
        objective.micro_steps = 3
        return objective, asked

    return rounds


def test_a_round_is_one_update_whose_last_loss_closes_it(make):
    objective, asked = make()
    losses = list(objective.round(0))
    assert [loss.share for loss in losses] == [1 / 3] * 3
    assert [loss.closes_update for loss in losses] == [False, False, True]
    assert asked == [0, 2, 4]
    assert losses[0].metrics.keys() == {"reward/smooth", "reward/total"}
    assert all(torch.equal(loss.loss, one_loss(objective).loss) for loss in losses)


def test_a_round_goes_on_after_the_losses_that_are_done(make):
    objective, asked = make()
    begun = objective.round(0)
    next(begun)  # and memory ran out in the second
    begun.close()
    assert [loss.closes_update for loss in objective.round(0, done=1)] == [False, True]
    assert asked == [0, 2, 4]
    list(objective.round(1))
    assert asked == [0, 2, 4, 6, 8, 10]


def test_the_next_round_follows_from_the_state(make):
    objective, _ = make()
    list(objective.round(0))
    other, asked = make()
    other.load_state_dict(objective.state_dict())
    list(other.round(1))
    assert asked == [6, 8, 10]
