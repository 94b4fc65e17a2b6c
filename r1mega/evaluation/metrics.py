"""pass@1, pass@k and cons@k with their uncertainty, from judged samples. Pure functions of numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from operator import eq
from typing import Any

import numpy as np
import numpy.typing as npt

_RESAMPLES = 10_000
_CHUNK = 4_000_000
"""Indices drawn at once: 32 MB, whatever the number of prompts."""


@dataclass(frozen=True)
class Outcome:
    """One sample of one prompt. `correct` is None where it could not be judged; `answer` is what it votes for, None if it gave none."""

    correct: bool | None
    answer: str | None = None


def summary(prompts: Sequence[Sequence[Outcome]], seed: int = 0, equal: Callable[[str, str], bool] = eq) -> dict[str, Any]:
    """Metrics of k samples for each prompt: `pass@1`, `pass@k` and `cons@k`, each as `estimate` gives it, and `n_prompts`, `k`.

    A sample that could not be judged counts as not correct, so the three are lower bounds; `not_judged` is the share of such samples.
    `equal(a, b)` says whether two answers are one vote. ValueError without prompts or where the numbers of samples differ.
    """
    counts = {len(outcomes) for outcomes in prompts}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"expected prompts with equally many samples, got {len(prompts)} prompts with {sorted(counts)} samples")
    k = counts.pop()
    correct = [sum(outcome.correct is True for outcome in outcomes) for outcomes in prompts]
    not_judged = sum(outcome.correct is None for outcomes in prompts for outcome in outcomes)
    return {
        "pass@1": estimate([pass_at(1, k, right) for right in correct], seed),
        f"pass@{k}": estimate([pass_at(k, k, right) for right in correct], seed),
        f"cons@{k}": estimate([consensus(outcomes, equal) for outcomes in prompts], seed),
        "not_judged": not_judged / (k * len(prompts)),
        "n_prompts": len(prompts),
        "k": k,
    }


def pass_at(k: int, n: int, correct: int) -> float:
    """Unbiased estimate of the probability that one of k samples is correct, from n samples of which `correct` are.

    1 - C(n - c, k) / C(n, k): Chen et al. 2021 (arXiv 2107.03374), equation 1. With k = 1 it is c / n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples, got {n}")
    return 1 - comb(n - correct, k) / comb(n, k)


def consensus(outcomes: Sequence[Outcome], equal: Callable[[str, str], bool] = eq) -> float:
    """Whether the answer given most often is correct (DeepSeek-R1's cons@k).

    Samples without an answer do not vote; without any vote the result is 0. Where several answers lead, the result is the mean over
    them, the expectation of drawing one at random: it depends neither on the order of the samples nor on luck. An answer is as
    correct as its judged samples are on average, which is 0 or 1 unless the judge looks at more than the answer.
    """
    groups: list[list[Outcome]] = []
    for outcome in outcomes:
        if outcome.answer is None:
            continue
        for group in groups:
            assert group[0].answer is not None
            if equal(group[0].answer, outcome.answer):
                group.append(outcome)
                break
        else:
            groups.append([outcome])
    most = max(map(len, groups), default=0)
    leaders = [_correctness(group) for group in groups if len(group) == most]
    return sum(leaders) / len(leaders) if leaders else 0.0


def estimate(values: Sequence[float], seed: int = 0, weights: Sequence[float] | None = None) -> dict[str, Any]:
    """`{"value": mean, "ci95": [low, high]}` of one value per prompt; with `weights`, all above 0, the weighted mean.

    The interval is the percentile bootstrap over prompts (10,000 resamples). It has no width where all values are equal, whatever
    their number.
    """
    data = np.asarray(values, dtype=np.float64)
    counts = None if weights is None else np.asarray(weights, dtype=np.float64)
    random = np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(data))
    means = np.concatenate(
        [
            _average(data[drawn], None if counts is None else counts[drawn])
            for start in range(0, _RESAMPLES, rows)
            for drawn in [random.integers(len(data), size=(min(rows, _RESAMPLES - start), len(data)))]
        ]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return {"value": float(_average(data, counts)), "ci95": [float(low), float(high)]}


def _average(values: npt.NDArray[np.float64], weights: npt.NDArray[np.float64] | None) -> npt.NDArray[np.float64]:
    """Along the last axis."""
    return values.mean(axis=-1) if weights is None else (values * weights).sum(axis=-1) / weights.sum(axis=-1)


def _correctness(group: Sequence[Outcome]) -> float:
    judged = [outcome.correct for outcome in group if outcome.correct is not None]
    return sum(judged) / len(judged) if judged else 0.0
