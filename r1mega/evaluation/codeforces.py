"""Codeforces rating and percentile: the human rating whose owner would be expected to reach the model's ranks.

DeepSeek-R1 says that "expected ratings and percentages of competitors are calculated" on ten Div. 2 contests, and gives no formula. This
is CodeElo's (Quan et al. 2025, arXiv 2501.01257; QwenLM/CodeElo, calc_rating.py), which is Codeforces' own expected rank solved for the
rating. The time of a submission does not count, since a model has none.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from r1mega.errors import UserError
from r1mega.evaluation.metrics import estimate

_POINTS_LOST = 50.0
"""For each wrong attempt before the right one, where problems have points."""

_MINUTES_LOST = 10.0
"""The same where they have none, and solved problems are counted."""

_ABOVE_BEST = 100.0
"""Rating above the best participant's, at most, that a model is given: whoever beats all has no expected rank."""

_BISECTIONS = 60

Ratings = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Participant:
    """Rating before the contest, and the result: points, or problems solved, and penalty."""

    rating: float
    points: float
    penalty: float


@dataclass(frozen=True)
class Contest:
    """A rated contest. `problems` are its indices (`A`, `B1`) with their points, None where solved problems are counted."""

    id: str
    problems: Mapping[str, float | None]
    participants: Sequence[Participant]


def load_contests(path: Path) -> list[Contest]:
    """Contests from a JSON file, a list of objects.

    Each has `contest_id`, `problems`, a list of `{"index": "A", "points": 500}` (no points where they are counted), and `participants`,
    a list of `{"rating": 1400, "points": 1500, "penalty": 0}`. Codeforces' API has them: `contest.standings` with
    `showUnofficial=false`, and `oldRating` of `contest.ratingChanges`. Raises UserError for a file of another kind.
    """
    values = _read(path)
    if not isinstance(values, list) or not values:
        raise UserError(f"{path}: expected a list of contests")
    return [_contest(value, f"{path}, contest {number}") for number, value in enumerate(values, 1)]


def load_ratings(path: Path) -> Ratings:
    """Ratings of all human participants, in order, from a JSON list of ratings or a JSON object from rating to number of people."""
    values = _read(path)
    try:
        if isinstance(values, dict):
            rating, people = np.array(list(values), dtype=np.float64), np.array(list(values.values()), dtype=np.int64)
            ratings = np.repeat(rating, people)
        else:
            ratings = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        ratings = np.empty(0)
    if ratings.ndim != 1 or not ratings.size or not np.isfinite(ratings).all():
        raise UserError(f"{path}: expected a list of human ratings, or an object from rating to number of people")
    return np.sort(ratings)


def expected_rating(
    contests: Sequence[Contest], results: Mapping[str, Mapping[str, Sequence[bool]]], humans: Ratings, attempts: int = 1, seed: int = 0
) -> dict[str, Any]:
    """`rating` and `percentile`, each as `metrics.estimate` gives it, and `contests` with the rating of each.

    `results[contest][problem]` are k verdicts, which make k / `attempts` runs; a run tries a problem until it is solved, but no more than
    `attempts` times. One attempt is pass@1; eight of eight is CodeElo's protocol. A problem without results counts as not solved;
    `answered` of `problems` have some. A contest's rating is the mean over its runs, the rating the mean over contests.
    ValueError for a contest without results, or where k is no multiple of `attempts`.
    """
    means = {}
    for contest in contests:
        given = results.get(contest.id)
        if not given:
            raise ValueError(f"no results for contest {contest.id}")
        means[contest.id] = float(np.mean([rating_of(contest, run) for run in _runs(given, attempts)]))
    rating = estimate(list(means.values()), seed)
    return {
        "rating": rating,
        "percentile": {
            "value": percentile(rating["value"], humans),
            "ci95": [percentile(bound, humans) for bound in rating["ci95"]],
        },
        "contests": means,
        "answered": sum(problem in results[contest.id] for contest in contests for problem in contest.problems),
        "problems": sum(len(contest.problems) for contest in contests),
    }


def rating_of(contest: Contest, run: Mapping[str, Sequence[bool]]) -> float:
    """The rating of one run: for each problem the attempts in order, of which those after the first right one do not count."""
    ratings = np.array([participant.rating for participant in contest.participants])
    return performance(ratings, rank(contest, *score(contest, run)))


def score(contest: Contest, run: Mapping[str, Sequence[bool]]) -> tuple[float, float]:
    """Points and penalty of one run.

    With points, a problem solved after w wrong attempts gives max(0, points - 50 w); else it gives 1 and a penalty of 10 w.
    """
    total = penalty = 0.0
    for problem, points in contest.problems.items():
        tries = list(run.get(problem, ()))
        if True not in tries:
            continue
        wrong = tries.index(True)
        if points is None:
            total, penalty = total + 1, penalty + _MINUTES_LOST * wrong
        else:
            total += max(0.0, points - _POINTS_LOST * wrong)
    return total, penalty


def rank(contest: Contest, points: float, penalty: float) -> int:
    """The number of participants who are at least as good: CodeElo's convention, in which the best of all has rank 0."""
    return sum((-participant.points, participant.penalty) <= (-points, penalty) for participant in contest.participants)


def performance(ratings: Ratings, rank: int) -> float:
    """The rating r with expected rank `rank` among participants of these ratings: 1 + sum_i 1 / (1 + 10^((r - r_i) / 400)) = rank.

    It lies between 0 and 100 above the best participant's, and is one of these bounds where no rating between them has that rank.
    """
    low, high = 0.0, float(ratings.max()) + _ABOVE_BEST
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if 1 + float(np.sum(1 / (1 + 10 ** ((middle - ratings) / 400)))) < rank:
            high = middle
        else:
            low = middle
    return low


def percentile(rating: float, humans: Ratings) -> float:
    """Per cent of human ratings, which are in order, that are below a rating."""
    return 100 * int(np.searchsorted(humans, rating, side="left")) / len(humans)


def _runs(given: Mapping[str, Sequence[bool]], attempts: int) -> list[dict[str, Sequence[bool]]]:
    counts = {len(verdicts) for verdicts in given.values()}
    k = counts.pop()
    if counts or k < 1 or k % attempts:
        raise ValueError(f"expected equally many verdicts for each problem, a multiple of {attempts}")
    return [{problem: verdicts[start : start + attempts] for problem, verdicts in given.items()} for start in range(0, k, attempts)]


def _read(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"no file {path}")
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None


def _contest(value: Any, where: str) -> Contest:
    try:
        problems = {str(problem["index"]): _optional(problem.get("points")) for problem in value["problems"]}
        people = [Participant(*(_number(person[name]) for name in ("rating", "points", "penalty"))) for person in value["participants"]]
        name = str(value["contest_id"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{where}: expected contest_id, problems and participants ({type(error).__name__}: {error})") from None
    if not problems or not people:
        raise UserError(f"{where}: no {'participants' if problems else 'problems'}")
    return Contest(name, problems, people)


def _optional(value: Any) -> float | None:
    return None if value is None else _number(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r:.40} is not a number")
    return float(value)
