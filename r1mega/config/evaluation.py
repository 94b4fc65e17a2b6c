"""Benchmarks and what must hold on them."""

from pydantic import Field

from r1mega.config.base import Closed, ExtractFunction, RewardFunction
from r1mega.config.prompts import PromptSet
from r1mega.config.rollout import Sampling


class Suite(Closed):
    """A benchmark: prompts, the function that judges, and how often each prompt is asked."""

    prompts: PromptSet
    judge: RewardFunction = Field(description="import path of the function whose value above 0.5 counts as correct")
    extract: ExtractFunction | None = Field(
        None, description="import path of `f(response) -> str | None`, the answer that consensus votes on"
    )
    k: int = Field(16, ge=1, description="samples per prompt")
    sampling: Sampling = Sampling()
    measures: dict[str, RewardFunction] = Field(
        default_factory=dict,
        description="further means: name -> import path of `f(prompt, response) -> float`; None or NaN: nothing to measure",
    )
    not_judged_limit: float = Field(0.01, ge=0, le=1, description="the run stops when a larger share of the answers is not judged")


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
