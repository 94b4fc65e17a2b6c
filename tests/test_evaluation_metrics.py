"""Metrics against values worked out by hand."""

import json
import math
from itertools import combinations, permutations

import numpy as np
import pytest

from r1mega.evaluation.metrics import Outcome, consensus, estimate, pass_at, summary


def outcomes(right: str, wrong: str = "", none: int = 0) -> list[Outcome]:
    """One sample per letter, the letter being its answer; `none` further samples gave no answer."""
    return [*(Outcome(True, letter) for letter in right), *(Outcome(False, letter) for letter in wrong), *([Outcome(False)] * none)]


# ---------------------------------------------------------------- pass@k


@pytest.mark.parametrize(
    ("k", "n", "correct", "value"),
    [
        (1, 16, 4, 0.25),
        (16, 16, 0, 0.0),
        (16, 16, 1, 1.0),
        (2, 4, 1, 0.5),
        (2, 4, 2, 5 / 6),
        (2, 4, 3, 1.0),
        (3, 5, 2, 0.9),
        (1, 1, 1, 1.0),
    ],
)
def test_pass_at(k: int, n: int, correct: int, value: float) -> None:
    assert pass_at(k, n, correct) == pytest.approx(value, abs=1e-15)


def test_pass_at_is_the_share_of_subsets_with_a_right_sample() -> None:
    for n in range(1, 8):
        for correct in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations([1] * correct + [0] * (n - correct), k))
                assert pass_at(k, n, correct) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_is_exact_for_many_samples() -> None:
    assert pass_at(64, 10_000, 1) == pytest.approx(64 / 10_000, rel=1e-12)
    with pytest.raises(ValueError, match="pass@8 needs at least 8 samples, got 4"):
        pass_at(8, 4, 1)


# ---------------------------------------------------------------- consensus


@pytest.mark.parametrize(
    ("samples", "value"),
    [
        (outcomes("aaa", "bc"), 1.0),
        (outcomes("a", "bbc"), 0.0),
        (outcomes("aa", "bb"), 1 / 2),
        (outcomes("a", "bcd"), 1 / 4),
        (outcomes("aa", "bbcc"), 1 / 3),
        (outcomes("a", "", none=15), 1.0),  # who gives no answer does not vote
        (outcomes("", "", none=16), 0.0),
        ([], 0.0),
        ([Outcome(None, "a"), Outcome(True, "a"), Outcome(False, "b")], 1.0),
        ([Outcome(None, "a"), Outcome(None, "a"), Outcome(True, "b")], 0.0),
    ],
)
def test_consensus(samples: list[Outcome], value: float) -> None:
    assert consensus(samples) == value


def test_consensus_does_not_depend_on_the_order() -> None:
    samples = outcomes("aab", "ccd")
    assert {consensus(order) for order in permutations(samples)} == {1 / 2}


def test_votes_for_equivalent_answers_join() -> None:
    samples = [Outcome(True, "0.5"), Outcome(True, "1/2"), Outcome(True, "2/4"), Outcome(False, "2"), Outcome(False, "2")]

    def equal(a: str, b: str) -> bool:
        from fractions import Fraction

        return Fraction(a) == Fraction(b)

    assert consensus(samples) == 0.0
    assert consensus(samples, equal) == 1.0


# ---------------------------------------------------------------- intervals


def test_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(5).random(400)
    found = estimate(values.tolist())
    half = 1.96 * values.std() / math.sqrt(400)
    assert found["value"] == pytest.approx(values.mean(), abs=1e-12)
    assert found["ci95"] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.05 * half)


def test_interval_holds_the_truth_in_95_of_100() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        low, high = estimate((random.random(100) < 0.4).astype(float).tolist(), seed)["ci95"]
        hits += low <= 0.4 <= high
    assert 180 <= hits <= 199


def test_interval_is_seeded_and_chunks_do_not_matter() -> None:
    values = list(np.random.default_rng(1).random(50))
    assert estimate(values, 3) == estimate(values, 3) != estimate(values, 4)
    large = list(np.random.default_rng(1).random(3_000))  # drawn in several chunks
    low, high = estimate(large)["ci95"]
    assert high - low == pytest.approx(2 * 1.96 * np.std(large) / math.sqrt(3_000), rel=0.05)


def test_interval_of_equal_values_has_no_width() -> None:
    assert estimate([1.0] * 7) == {"value": 1.0, "ci95": [1.0, 1.0]}
    assert estimate([0.25]) == {"value": 0.25, "ci95": [0.25, 0.25]}


# ---------------------------------------------------------------- summary


def test_summary() -> None:
    prompts = [outcomes("aaa", "b"), outcomes("a", "bbb"), outcomes("aa", "bb"), outcomes("", "abcd")]
    found = summary(prompts)
    assert [found[name]["value"] for name in ("pass@1", "pass@4", "cons@4")] == [6 / 16, 3 / 4, 1.5 / 4]
    assert (found["n_prompts"], found["k"], found["not_judged"]) == (4, 4, 0.0)
    assert all(low <= found[name]["value"] <= high for name in ("pass@1", "pass@4", "cons@4") for low, high in [found[name]["ci95"]])
    assert json.loads(json.dumps(found)) == found
    assert summary(prompts) == found


def test_not_judged_is_counted_and_told() -> None:
    found = summary([[Outcome(True, "a"), Outcome(None, "b")], [Outcome(None), Outcome(None)]])
    assert (found["pass@1"]["value"], found["pass@2"]["value"], found["not_judged"]) == (0.25, 0.5, 0.75)


def test_one_sample_per_prompt() -> None:
    found = summary([outcomes("a"), outcomes("", "b")])
    assert found["pass@1"]["value"] == found["cons@1"]["value"] == 0.5


@pytest.mark.parametrize("prompts", [[], [[]], [outcomes("a"), outcomes("ab")]])
def test_summary_needs_equally_many_samples(prompts: list[list[Outcome]]) -> None:
    with pytest.raises(ValueError, match="expected prompts with equally many samples"):
        summary(prompts)
