"""Losses of reward models against their formulas, worked by hand."""

import math

import pytest
import torch

from r1mega.objectives import preference


def test_pairwise_is_the_log_likelihood_of_bradley_and_terry():
    chosen, rejected = torch.tensor([1.0, 0.0, -200.0, 200.0]), torch.tensor([0.0, 2.0, 200.0, -200.0])
    found = preference.pairwise(chosen, rejected).tolist()
    assert found == pytest.approx([math.log(1 + math.exp(-1)), math.log(1 + math.exp(2)), 400.0, 0.0])
    strengths = torch.tensor([0.3, 1.7]).exp()  # P(first is better) = strength / sum of strengths
    assert preference.pairwise(*torch.tensor([[0.3], [1.7]])).item() == pytest.approx(-math.log(strengths[0] / strengths.sum()))


def test_pairwise_gradient():
    scores = torch.tensor([0.4, -0.1], requires_grad=True)
    preference.pairwise(scores[0], scores[1]).backward()
    wrong = 1 / (1 + math.exp(0.5))  # the model's probability of the other judgement
    assert scores.grad.tolist() == pytest.approx([-wrong, wrong])


def test_pointwise_is_binary_cross_entropy():
    scores, safe = torch.tensor([2.0, 2.0, 0.0, -300.0]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    expected = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(2)), math.log(2), 300.0]
    assert preference.pointwise(scores, safe).tolist() == pytest.approx(expected)


def test_ranked():
    assert preference.ranked(torch.tensor([1.0, 0.0, 5.0]), torch.tensor([0.0, 1.0, 5.0])).tolist() == [1.0, 0.0, 0.5]


def test_outscored_averages_to_the_area_under_the_curve():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 9, (60,), generator=generator).float()  # with ties
    safe = (torch.rand(60, generator=generator) < 0.4).float()
    higher, lower = scores[safe == 1], scores[safe == 0]
    by_pairs = [[(1.0 if a > b else 0.5 if a == b else 0.0) for b in lower.tolist()] for a in higher.tolist()]
    found = preference.outscored(scores, safe)
    assert found.tolist() == pytest.approx([sum(row) / len(row) for row in by_pairs])
    assert preference.outscored(safe, safe).tolist() == [1.0] * int(safe.sum())
