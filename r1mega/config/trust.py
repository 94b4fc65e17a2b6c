"""How far the engine's log-probs may be from the trainer's, and what is done about it."""

from typing import Literal

from pydantic import Field, model_validator

from r1mega.config.base import Closed

Measure = Literal[
    "rollout_gap/mean",
    "rollout_gap/max",
    "rollout_gap/p50",
    "rollout_gap/p99",
    "rollout_gap/p99.9",
    "rollout_ratio/mean",
    "rollout_ratio/max",
    "rollout_kl/k1",
    "rollout_kl/k3",
    "rollout_sequence/max",
    "probe_gap/after_max",
]


class Limit(Closed):
    """A bound on one measure of the gap between engine and trainer, over all tokens of a rollout."""

    measure: Measure = Field(description="a measure of the metrics, see docs/rollout.md; probe_gap needs trust.probe")
    most: float = Field(description="the largest value that is within the budget")
    then: Literal["warn", "correct", "stop"] = Field(
        "warn",
        description="what happens beyond; warn: a line in the terminal; correct: this rollout is trained on with objective.mismatch; "
        "stop: the run ends before it trains on the rollout, its state saved",
    )


class Attribution(Closed):
    """How the cause of a gap is looked for."""

    every: int = Field(0, ge=0, description="updates between attributions without a reason; 0: only when the budget is exceeded")
    again: int = Field(100, ge=1, description="updates after which a budget that stays exceeded is attributed again")
    responses: int = Field(16, ge=1, description="responses that are looked at, those of the rollout with the largest mean gap")
    new_tokens: int = Field(64, ge=1, description="most tokens of each response that is drawn to compare drawing with reading")
    keep_previous: bool = Field(
        False, description="keep the weights of this sync and of the one before on the host, by which a stale engine is known"
    )


class Trust(Closed):
    """The mismatch budget between engine and trainer."""

    budget: list[Limit] = Field(
        default_factory=list,
        description="limits, held against every rollout before it is trained on; any limit costs one more forward pass over the "
        "rollout's first minibatch",
    )
    attribution: Attribution = Field(default_factory=Attribution, description="how the cause of a gap is looked for")
    probe: int = Field(0, ge=0, description="prompts that engine and trainer score before and after every sync, always the same; 0: none")

    @model_validator(mode="after")
    def _measures_exist(self) -> "Trust":
        if not self.probe and any(limit.measure.startswith("probe_gap/") for limit in self.budget):
            raise ValueError("a limit on probe_gap needs prompts to probe with: set probe")
        return self
