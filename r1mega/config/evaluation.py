"""Benchmarks and what must hold on them."""

from typing import Literal

from pydantic import Field, model_validator

from r1mega.config.base import Closed, EqualFunction, ExtractFunction, FilePath, RewardFunction
from r1mega.config.prompts import PromptSet
from r1mega.config.rollout import Sampling


class Rating(Closed):
    """What a Codeforces rating is computed from, beside the verdicts."""

    contests: FilePath = Field(description="JSON file of contests, their problems and participants (docs/benchmarks.md)")
    humans: FilePath = Field(description="JSON file of the ratings of all human participants, of which the percentile is one")
    attempts: int = Field(1, ge=1, description="tries at a problem in one run; divides k")


class Suite(Closed):
    """A benchmark: prompts, the function that judges, and how often each prompt is asked.

    In a recipe, `{suite: NAME, data: FILE}` is one that ships with r1mega, and keys beside these two replace its own.
    """

    prompts: PromptSet
    judge: RewardFunction = Field(description="import path of the function whose value above 0.5 counts as correct")
    deadline_s: float = Field(10.0, gt=0, description="seconds for one call of a function; then its process is killed")
    extract: ExtractFunction | None = Field(
        None, description="import path of `f(response) -> str | None`, the answer that consensus votes on; left out: there is no vote"
    )
    equal: EqualFunction | None = Field(
        None, description="import path of `f(answer, other_answer) -> bool`, whether two answers are one vote; left out: equal strings are"
    )
    k: int = Field(16, ge=1, description="samples per prompt")
    sampling: Sampling = Sampling()
    measures: dict[str, RewardFunction] = Field(
        default_factory=dict,
        description="further means: name -> import path of `f(prompt, response) -> float`; None or NaN: nothing to measure",
    )
    weights: dict[str, RewardFunction] = Field(
        default_factory=dict,
        description="weighted means: name of a measure -> import path of `f(prompt, response) -> float`, what its value counts for",
    )
    rating: Rating | None = Field(None, description="codeforces: also compute a rating and its percentile")
    truncated: Literal["wrong", "judged"] = Field(
        "wrong", description="what an answer is that the length cap cut: wrong, and without a vote, or judged by its text as it stands"
    )
    not_judged_limit: float = Field(0.01, ge=0, le=1, description="the run stops when a larger share of the answers is not judged")

    @model_validator(mode="after")
    def _names_agree(self) -> "Suite":
        unknown = [name for name in self.weights if name not in self.measures]
        if unknown:
            raise ValueError(f"weights: {unknown[0]!r} is none of the measures ({', '.join(self.measures) or 'there are none'})")
        if self.equal is not None and self.extract is None:
            raise ValueError("equal compares the answers that extract finds; name an extract function too")
        if self.rating is not None and self.k % self.rating.attempts:
            raise ValueError(f"rating.attempts={self.rating.attempts} does not divide k={self.k}")
        return self


class Gate(Closed):
    """A bound that an evaluation metric must keep, or the stage fails."""

    metric: str = Field(description="metric name, such as 'pass@1'")
    min: float | None = Field(None, description="smallest value that passes")
    max: float | None = Field(None, description="largest value that passes")


class Evaluation(Closed):
    """Evaluations inside a training stage."""

    suites: dict[str, Suite] = Field(min_length=1, description="benchmarks by name")
    every: int = Field(0, ge=0, description="updates between evaluations; 0: only after the last update")
    at_start: bool = Field(False, description="also evaluate before the first update")
