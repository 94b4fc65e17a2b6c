"""Codeforces ratings: the formula against its own inverse, ranks and penalties, files."""

import json

import numpy as np
import pytest

from r1mega.errors import UserError
from r1mega.evaluation.codeforces import (
    Contest,
    Participant,
    expected_rating,
    load_contests,
    load_ratings,
    percentile,
    performance,
    rank,
    rating_of,
    score,
)

RATINGS = np.random.default_rng(0).normal(1400, 300, 2000)


def contest(points: float | None = 500, people: int = 400) -> Contest:
    random = np.random.default_rng(1)
    problems = {index: None if points is None else points * (place + 1) for place, index in enumerate("ABCD")}
    participants = [
        Participant(rating, sum(sorted(filter(None, problems.values()))[:solved]) if points else solved, 0 if points else 20 * solved)
        for rating, solved in zip(random.normal(1400, 300, people), random.integers(0, 5, people), strict=True)
    ]
    return Contest("1", problems, participants)


@pytest.mark.parametrize("rating", [300.0, 1000.0, 1400.0, 2029.0])
def test_the_rating_whose_expected_rank_is_the_rank(rating):
    seed = 1 + np.sum(1 / (1 + 10 ** ((rating - RATINGS) / 400)))
    found = performance(RATINGS, seed)
    assert found == pytest.approx(rating, abs=1e-6)
    assert performance(RATINGS, seed - 20) > found > performance(RATINGS, seed + 20)


def test_two_equal_players_by_hand():
    """Expected rank 1.5 against one player of rating 1500 is an equal one; 1 + 1/11 is 400 points better."""
    assert performance(np.array([1500.0]), 1.5) == pytest.approx(1500)
    assert performance(np.array([1500.0]), 1 + 10 / 11) == pytest.approx(1100)
    assert performance(np.array([1500.0, 1500.0]), 2) == pytest.approx(1500)


def test_the_rating_is_bounded():
    assert performance(RATINGS, 0) == pytest.approx(RATINGS.max() + 100)
    assert performance(RATINGS, len(RATINGS) + 1) == 0


def test_integer_bisection_of_the_published_script_gives_the_same():
    for place in (0, 1, 40, 700, 1999):
        low, high = 0, int(max(RATINGS)) + 100
        while high - low > 1:
            middle = (low + high) // 2
            if 1 + sum(1 / (1 + 10 ** ((middle - rating) / 400)) for rating in RATINGS) < place:
                high = middle
            else:
                low = middle
        assert performance(RATINGS, place) == pytest.approx(low, abs=1 + (place <= 1))


def test_points_fall_and_penalties_grow_with_wrong_attempts():
    pointed, counted = contest(), contest(None)
    assert score(pointed, {"A": [True], "B": [False, False, True, False], "C": [False]}) == (500 + 1000 - 100, 0)
    assert score(pointed, {"A": [False] * 11 + [True]}) == (0, 0)
    assert score(counted, {"A": [True], "B": [False, False, True], "C": [False]}) == (2, 20)
    assert score(pointed, {}) == (0, 0) and score(pointed, {"Z": [True]}) == (0, 0)


def test_rank_is_the_number_of_people_at_least_as_good():
    people = [Participant(1500, 3, 50), Participant(1500, 3, 60), Participant(1500, 1, 0)]
    ranked = Contest("1", {"A": None}, people)
    assert [rank(ranked, *result) for result in ((4, 0), (3, 50), (3, 55), (3, 60), (1, 0), (1, 1), (0, 0))] == [0, 1, 1, 2, 3, 3, 3]


def test_better_results_give_better_ratings():
    for one in (contest(), contest(None)):
        runs = [{}, {"A": [True]}, {"A": [True], "B": [False, True]}, {"A": [True], "B": [True]}, {index: [True] for index in "ABCD"}]
        ratings = [rating_of(one, run) for run in runs]
        assert ratings == sorted(ratings) and ratings[0] < ratings[1] < ratings[-1]


def test_k_verdicts_make_runs():
    one, humans = contest(), np.sort(RATINGS)
    results = {"1": {"A": [True, False, True, True], "B": [False, True, False, False]}}
    single = expected_rating([one], results, humans)
    runs = [{"A": [a], "B": [b]} for a, b in zip(*results["1"].values(), strict=True)]
    assert single["rating"]["value"] == pytest.approx(np.mean([rating_of(one, run) for run in runs]))
    best = expected_rating([one], results, humans, attempts=4)
    assert best["rating"]["value"] == pytest.approx(rating_of(one, results["1"]))
    assert best["rating"]["value"] > single["rating"]["value"]
    assert (best["answered"], best["problems"], list(best["contests"])) == (2, 4, ["1"])
    assert best["percentile"]["value"] == percentile(best["rating"]["value"], humans)
    with pytest.raises(ValueError, match="a multiple of 3"):
        expected_rating([one], results, humans, attempts=3)
    with pytest.raises(ValueError, match="no results for contest 1"):
        expected_rating([one], {}, humans)


def test_percentile_counts_those_below():
    assert [percentile(rating, np.array([1.0, 2, 2, 3])) for rating in (0, 2, 2.5, 3, 4)] == [0, 25, 75, 75, 100]


def test_files(tmp_path):
    value = {
        "contest_id": 2024,
        "problems": [{"index": "A", "points": 500}, {"index": "B"}],
        "participants": [{"rating": 1400, "points": 500, "penalty": 0}],
    }
    path = tmp_path / "contests.json"
    path.write_text(json.dumps([value]))
    assert load_contests(path) == [Contest("2024", {"A": 500.0, "B": None}, [Participant(1400.0, 500.0, 0.0)])]
    for name in ("contest_id", "problems", "participants"):
        path.write_text(json.dumps([{key: item for key, item in value.items() if key != name}]))
        with pytest.raises(UserError, match=f"contests.json, contest 1: .*{name}"):
            load_contests(path)
    for text, message in (("[", "not JSON"), ("{}", "expected a list of contests"), ("[1]", "contest 1")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_contests(path)
    people = tmp_path / "humans.json"
    for values in ([3, 1, 2, 2], {"1": 1, "2": 2, "3": 1}):
        people.write_text(json.dumps(values))
        assert load_ratings(people).tolist() == [1, 2, 2, 3]
    for bad in ([], {}, ["a"], [None], {"a": 1}, [[1]], 3):
        people.write_text(json.dumps(bad))
        with pytest.raises(UserError, match="expected a list of human ratings"):
            load_ratings(people)
    with pytest.raises(UserError, match="no file"):
        load_ratings(tmp_path / "none.json")
