"""One rollout's answers and how they were judged; its minibatches as training sequences and as metrics."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from r1mega.config.training import GrpoObjective
from r1mega.data.packing import ROUTED, ROUTING, TokenSequence
from r1mega.objectives.grpo import group_advantages, token_weights, uniform_groups
from r1mega.rollout.ask import Question, Response
from r1mega.rollout.engine import Sample

_MOST_LEVELS = 12
"""Difficulties with a pass rate of their own; a field with more different values is none."""


@dataclass(frozen=True)
class Judgement:
    """How P prompts' G responses each were judged. All tensors are float32 [P, G]."""

    rewards: Tensor
    """The weighted sum; NaN where a part of it could not be judged."""
    parts: Mapping[str, Tensor]
    """Each reward by name, unweighted; NaN where it could not be judged or does not judge that kind of prompt."""
    measures: Mapping[str, Tensor]
    """What is only logged, by name; NaN where there is nothing to measure."""
    correct: Tensor
    """1 or 0; NaN where no rule says."""
    reasons: list[str]
    """Why rewards could not be judged."""


@dataclass(frozen=True)
class DrawnBy:
    """The weights that the engine had when a rollout began."""

    version: int
    weights: list[Tensor] | None = None
    """This rank's, on the host; None: the policy has them still."""


@dataclass
class Rollout:
    """The answers of one rollout. P prompts, G responses each."""

    kinds: list[str]
    """For each prompt, the name of its set."""
    questions: list[Question]
    groups: list[list[Response]]
    judgement: Judgement
    seconds: dict[str, float] = field(default_factory=dict)
    drawn_by: DrawnBy | None = None
    """None: the policy's weights as they are before the first of its updates drew every token."""


class Minibatch:
    """Whole groups of one rollout, turned into weighted token sequences."""

    def __init__(self, rollout: Rollout, groups: slice, objective: GrpoObjective, replays: bool) -> None:
        """`replays`: whether tokens are trained through the experts that they went through in the engine."""
        found = rollout.judgement
        self.kinds, self.questions = rollout.kinds[groups], rollout.questions[groups]
        self.rewards, self.correct = found.rewards[groups], found.correct[groups]
        self.parts = {name: values[groups] for name, values in found.parts.items()}
        self.measures = {name: values[groups] for name, values in found.measures.items()}
        self.responses = [response for group in rollout.groups[groups] for response in group]
        judged = ~self.rewards.isnan()
        self.advantages = group_advantages(self.rewards, judged, objective.normalize_std).flatten()
        self.uniform = uniform_groups(self.rewards, judged)
        self.samples = [response.sample for response in self.responses]
        self.lengths = torch.tensor([len(sample.response_ids) for sample in self.samples])
        self.truncated = torch.tensor([sample.finish == "length" for sample in self.samples])
        weights = token_weights(self.lengths, self.truncated, self.uniform.repeat_interleave(self.rewards.shape[1]), objective)
        self.sequences = [
            _sequence(index, *parts) for index, parts in enumerate(zip(self.responses, weights, self.advantages, strict=True))
        ]
        if replays:
            self.sequences = [_extended(one, routing_extras(sample)) for one, sample in zip(self.sequences, self.samples, strict=True)]
        if rollout.drawn_by is not None:
            version = rollout.drawn_by.version
            self.sequences = [_marked(one, sample, version) for one, sample in zip(self.sequences, self.samples, strict=True)]

    def metrics(self, difficulty: str) -> dict[str, float]:
        """What the rollout alone says: rewards, lengths, measures (all, correct and wrong), pass rates, truncation, uniform groups."""
        lengths, rewards = self.lengths.float().view_as(self.rewards), self.rewards
        found = {
            "responses": len(self.responses),
            "reward/mean": rewards.nanmean().item(),
            "response_length/max": lengths.max().item(),
            "truncated": self.truncated.float().mean().item(),
            "uniform_groups": self.uniform.float().mean().item(),
            "not_judged": rewards.isnan().float().mean().item(),
            "pass_rate": self.correct.nanmean().item(),
        }
        for name, values in {"response_length": lengths, **self.measures}.items():
            found |= self._split(name, values)
        found |= {f"reward/{name}": values.nanmean().item() for name, values in self.parts.items()}
        if len(set(self.kinds)) > 1:
            for kind, rows in _rows_by(self.kinds):
                found[f"reward/of_{kind}"] = rewards[rows].nanmean().item()
        levels = [question.prompt.meta.get(difficulty) for question in self.questions]
        if 1 < len(set(levels)) <= _MOST_LEVELS:
            for level, rows in _rows_by(levels):
                found[f"pass_rate/{difficulty}_{level}"] = self.correct[rows].nanmean().item()
        # A mean over nothing is no number, and no row's business.
        return {name: value for name, value in found.items() if value == value}

    def _split(self, name: str, values: Tensor) -> dict[str, float]:
        """Means over all responses, and over the correct and the wrong ones apart: long wrong answers look like progress otherwise."""
        return {
            f"{name}/mean": values.nanmean().item(),
            f"{name}/correct": values[self.correct == 1].nanmean().item(),
            f"{name}/wrong": values[self.correct == 0].nanmean().item(),
        }

    def age(self, update: int) -> dict[str, float]:
        """Optimizer steps between the weights that drew a token and those that update number `update` (from 0) moves."""
        spans = [(update - version, count) for response in self.responses for version, count in response.sample.versions]
        return {
            "staleness/mean": sum(age * count for age, count in spans) / sum(count for _, count in spans),
            "staleness/max": max(age for age, _ in spans),
            "continued": sum(bool(response.sample.earlier_versions) for response in self.responses) / len(self.responses),
        }

    def record(self) -> list[dict[str, Any]]:
        """Plain JSON of every response, for a batch that has to be looked at."""
        return [
            {
                "prompt_ids": response.sample.prompt_ids,
                "response_ids": response.sample.response_ids,
                "logprobs": response.sample.logprobs,
                "text": response.text,
                "reward": float(reward),
                "advantage": float(advantage),
            }
            for response, reward, advantage in zip(self.responses, self.rewards.flatten(), self.advantages, strict=True)
        ]


def _rows_by(names: Sequence[Any]) -> Iterator[tuple[Any, list[int]]]:
    for name in sorted(set(names), key=str):
        if name is not None:
            yield name, [row for row, other in enumerate(names) if other == name]


def _sequence(index: int, response: Response, weight: Tensor, advantage: Tensor) -> TokenSequence:
    sample = response.sample
    prompt = len(sample.prompt_ids)
    weights, advantages, logprobs = values = torch.zeros(3, prompt + len(sample.response_ids))
    values[:2, prompt:] = torch.stack([weight, advantage])[:, None]
    logprobs[prompt:] = torch.tensor(sample.logprobs)
    tokens = torch.tensor(sample.prompt_ids + sample.response_ids)
    extras = {"advantages": advantages, "rollout_logprobs": logprobs, "sequence": torch.full_like(tokens, index)}
    return TokenSequence(tokens, weights, extras)


def routing_extras(sample: Sample) -> dict[str, Tensor]:
    """By which its training sequence goes through the experts that it says its tokens went through; none where it does not say.

    The pass over token i - 1 predicts token i.
    """
    if sample.routing is None:
        return {}
    count, rows = len(sample.prompt_ids) + len(sample.response_ids), len(sample.routing)
    routing = torch.cat([sample.routing.new_zeros(count - rows, *sample.routing.shape[1:]), sample.routing])
    return {ROUTING: routing, ROUTED: torch.arange(count) >= count - rows}


def _marked(sequence: TokenSequence, sample: Sample, version: int) -> TokenSequence:
    """With `earlier`, bool: tokens that other weights than those of `version` drew."""
    earlier = torch.zeros(len(sequence.tokens), dtype=torch.bool)
    place = len(sample.prompt_ids)
    for drawn_by, count in sample.versions:
        earlier[place : place + count] = drawn_by != version
        place += count
    return _extended(sequence, {"earlier": earlier})


def _extended(sequence: TokenSequence, extras: dict[str, Tensor]) -> TokenSequence:
    return replace(sequence, extras={**sequence.extras, **extras})
