"""The numbers of an evaluation are means over all tokens, of each example once."""

import math
from types import SimpleNamespace

import torch

from perce.model.passes import TokenStatistics
from perce.training.evaluating import in_order_of_dataset, metrics_of, sums_of


def example(number, logp, personal):
    logp = torch.tensor(logp)
    nothing = torch.zeros(len(logp))
    return TokenStatistics(nothing, logp, 2 * logp, nothing, nothing, torch.tensor(personal), number)


BATCHES = [[example(2, [-1.0, -3.0], [True, False])], [example(0, [-5.0], [False]), example(1, [-7.0], [False])]]


def test_means_are_over_tokens():
    found = metrics_of(sums_of(BATCHES, range(3)))
    assert found["loss"] == found["loss_with_persona"] == 16 / 4
    assert (found["loss_without_persona"], found["pir_mean"], found["loss_personal_tokens"]) == (8.0, 4.0, 1.0)


def test_without_personal_tokens_their_loss_is_not_a_number():
    found = metrics_of(sums_of(BATCHES[1:], range(2)))
    assert math.isnan(found["loss_personal_tokens"]) and found["loss"] == 6


def test_an_example_that_is_evaluated_again_counts_once():
    """Another process is given the first ones once more, at the end."""
    assert len(sums_of([*BATCHES, BATCHES[0]], range(3))) == 3


def test_examples_are_in_the_order_of_the_dataset():
    loader = SimpleNamespace(batch_sampler=[[2], [0, 1]])
    assert [x.example for x in in_order_of_dataset(BATCHES, loader)] == [0, 1, 2]
    anothers = SimpleNamespace(batch_sampler=iter([[0], [2, 1]]))
    assert [x.example for x in in_order_of_dataset(BATCHES, anothers)] == [2, 0, 1], "as they came"
