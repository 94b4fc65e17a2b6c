"""One benchmark: its questions asked k times, judged in processes of their own, and counted."""

import gzip
import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from r1mega import heartbeat
from r1mega.config.base import at
from r1mega.config.evaluation import Suite
from r1mega.config.rollout import Reward
from r1mega.data.prompts import Prompt
from r1mega.data.sources import load_prompts
from r1mega.data.templates import encode
from r1mega.errors import UserError
from r1mega.evaluation import codeforces, versions, votes
from r1mega.evaluation.metrics import Outcome, estimate, summary
from r1mega.pipeline import ranks
from r1mega.pipeline.model_folder import ModelFolder
from r1mega.rewards.judge import Judge, Verdict
from r1mega.rewards.worker import NO_VALUE
from r1mega.rollout.ask import Question, Response, ask
from r1mega.rollout.engine import Engine, SamplingParams

Answered = Sequence[tuple[Prompt, Response]]
"""k responses to the first question, then k to the second, and so on."""

T = TypeVar("T")

Verdicts = Sequence[Mapping[str, Verdict]]


class Benchmark:
    """One suite, ready to be asked again and again: prompts encoded, judge processes running."""

    def __init__(self, name: str, suite: Suite, model: ModelFolder, seed: int, judges: int = 1) -> None:
        """`judges`: processes that judge, beside every rank."""
        self.name, self.suite, self.seed = name, suite, seed
        self.prompts = load_prompts(suite.prompts, Path())
        self.use(model)
        self._version = ranks.on_first(lambda: versions.version(suite, self.prompts))
        functions = self._functions() | ({"equal": suite.equal} if suite.equal else {})
        # Whatever a user's function may do, it does in a process that can be killed.
        rewards = {key: Reward(function=path, deadline_s=suite.deadline_s) for key, path in functions.items()}
        self._judge = Judge(rewards, judges, texts={"extract": 1})

    def use(self, model: ModelFolder) -> None:
        """Ask in this model's tokens from now on."""
        self.model = model
        room = model.prompt_room(at(self.suite.sampling.max_new_tokens, 0))
        encoded = encode(self.prompts, self.suite.prompts.template, model.tokenizer, room)
        self.questions = [Question(prompt, ids) for prompt, ids in zip(self.prompts, encoded, strict=True)]

    def __enter__(self) -> "Benchmark":
        return self

    def __exit__(self, *_: object) -> None:
        self._judge.close()

    def measure(self, engine: Engine, samples: Path | None = None) -> dict[str, Any]:
        """Metrics of the engine's current weights, the same on every rank. `samples`: file (.jsonl.gz) for what was answered."""
        sampling = self.suite.sampling
        params = SamplingParams(at(sampling.temperature, 0), at(sampling.top_p, 0), self.model.stop_token_ids)
        cap = int(at(sampling.max_new_tokens, 0))
        groups = ask(engine, self.questions, self.suite.k, params, cap, f"{self.seed}/{self.name}", self.model.tokenizer)
        answered = [(question.prompt, response) for question, group in zip(self.questions, groups, strict=True) for response in group]
        names = list(self._functions())
        mine = [(prompt, response.text) for prompt, response in ranks.dealt(answered)]
        with heartbeat.phase("evaluate"):
            verdicts = ranks.collected(self._judge.judge(mine, [names] * len(mine)))
            return ranks.shared(lambda: self._judged(answered, verdicts, samples))

    def _functions(self) -> dict[str, str]:
        """What every response is judged by."""
        suite = self.suite
        measures = {f"measure_{key}": path for key, path in suite.measures.items()}
        weights = {f"weight_{key}": path for key, path in suite.weights.items()}
        return {"judge": suite.judge, **measures, **weights, **({"extract": suite.extract} if suite.extract else {})}

    def _judged(self, answered: Answered, verdicts: Verdicts, samples: Path | None) -> dict[str, Any]:
        """The metrics, made on rank 0."""
        for key in ("judge", "extract") if self.suite.extract else ("judge",):
            self._check_judged(key, [verdict[key].reason for verdict in verdicts])
        outcomes = [self._outcome(response, verdict) for (_, response), verdict in zip(answered, verdicts, strict=True)]
        if samples is not None:
            write_samples(samples, answered, outcomes)
        return (
            self._counted(outcomes)
            | self._lengths([response for _, response in answered])
            | {key: self._mean(key, verdicts) for key in self.suite.measures}
            | self._rating(answered, outcomes)
            | {"suite": self._version}
        )

    def _counted(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """pass@1, pass@k and, where there are votes, cons@k."""
        grouped = list(self._by_prompt(outcomes))
        if self.suite.extract is None:
            measured = summary(grouped, self.seed)
            del measured[f"cons@{self.suite.k}"]
            return measured
        if self.suite.equal is None:
            return summary(grouped, self.seed)
        voted, not_compared = self._votes(grouped)
        return summary(voted, self.seed) | {"not_compared": not_compared}

    def _votes(self, grouped: Sequence[Sequence[Outcome]]) -> tuple[list[list[Outcome]], float]:
        """The outcomes with equal answers made one, and the share of comparisons that could not be made."""
        made: list[Verdict] = []

        def equal(pairs: list[votes.Pair]) -> list[bool | None]:
            verdicts = [verdict["equal"] for verdict in self._judge.judge(pairs, [["equal"]] * len(pairs))]
            made.extend(verdicts)
            return [None if verdict.value is None else verdict.value > 0.5 for verdict in verdicts]

        answers = [[outcome.answer for outcome in outcomes if outcome.answer is not None] for outcomes in grouped]
        chosen = votes.merged(answers, equal)
        voted = [
            [Outcome(outcome.correct, None if outcome.answer is None else vote[outcome.answer]) for outcome in outcomes]
            for outcomes, vote in zip(grouped, chosen, strict=True)
        ]
        return voted, sum(verdict.value is None for verdict in made) / max(1, len(made))

    def _lengths(self, responses: Sequence[Response]) -> dict[str, Any]:
        lengths = [float(len(response.sample.response_ids)) for response in responses]
        return {
            "response_length": estimate([statistics.fmean(group) for group in self._by_prompt(lengths)], self.seed),
            "truncated": statistics.fmean(response.sample.finish == "length" for response in responses),
        }

    def _mean(self, key: str, verdicts: Verdicts) -> dict[str, Any] | None:
        """A measure's mean over prompts of the means over their samples, weighted where the suite says so; None if nothing was measured."""
        found = [verdict[f"measure_{key}"] for verdict in verdicts]
        self._check_judged(f"measures.{key}", [None if verdict.reason in NO_VALUE else verdict.reason for verdict in found])
        weights = [1.0] * len(found)
        if key in self.suite.weights:
            given = [verdict[f"weight_{key}"] for verdict in verdicts]
            self._check_judged(f"weights.{key}", [verdict.reason for verdict in given])
            weights = [verdict.value or 0.0 for verdict in given]
        values, sums = [], []
        for group in self._by_prompt(list(zip(found, weights, strict=True))):
            measured = [(verdict.value, weight) for verdict, weight in group if verdict.value is not None]
            total = sum(weight for _, weight in measured)
            if total > 0:
                values.append(sum(value * weight for value, weight in measured) / total)
                sums.append(total / len(measured))
        if not values:
            return None
        return estimate(values, self.seed, sums if key in self.suite.weights else None)

    def _rating(self, answered: Answered, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        if self.suite.rating is None:
            return {}
        contests = codeforces.load_contests(Path(self.suite.rating.contests))
        humans = codeforces.load_ratings(Path(self.suite.rating.humans))
        results: dict[str, dict[str, list[bool]]] = {}
        for (prompt, _), outcome in zip(answered, outcomes, strict=True):
            if "contest" not in prompt.meta:
                raise UserError(f"suite {self.name}: 'rating' needs prompts of codeforces; {prompt.id} has no contest")
            contest = results.setdefault(str(prompt.meta["contest"]), {})
            contest.setdefault(str(prompt.meta["index"]), []).append(outcome.correct is True)
        try:
            found = codeforces.expected_rating(contests, results, humans, self.suite.rating.attempts, self.seed)
        except ValueError as error:
            raise UserError(f"suite {self.name}: 'rating': {error}") from None
        # Of less than 1 the rating is a lower bound: a problem that was not asked counts as not solved.
        return {"rating": found["rating"], "percentile": found["percentile"], "problems_asked": found["answered"] / found["problems"]}

    def _check_judged(self, key: str, reasons: Sequence[str | None]) -> None:
        """A function that fails says nothing about the model."""
        failed = [reason for reason in reasons if reason is not None]
        if len(failed) > self.suite.not_judged_limit * len(reasons):
            raise UserError(
                f"suite {self.name}: {key} could not judge {len(failed) / len(reasons):.1%} of the answers, more than not_judged_limit="
                f"{self.suite.not_judged_limit:g}; first reason: {failed[0]}"
            )

    def _outcome(self, response: Response, verdict: Mapping[str, Verdict]) -> Outcome:
        if self.suite.truncated == "wrong" and response.sample.finish == "length":
            return Outcome(False, None)
        value = verdict["judge"].value
        return Outcome(None if value is None else value > 0.5, verdict["extract"].text if self.suite.extract else None)

    def _by_prompt(self, values: Sequence[T]) -> Iterator[Sequence[T]]:
        return (values[start : start + self.suite.k] for start in range(0, len(values), self.suite.k))


def write_samples(path: Path, answered: Answered, outcomes: Sequence[Outcome]) -> None:
    """One JSON line a sample, in the order of the questions, gzipped; the file is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with gzip.open(temporary, "wt", encoding="utf-8") as file:
        for (prompt, response), outcome in zip(answered, outcomes, strict=True):
            row = {
                "prompt_id": prompt.id,
                "prompt": prompt.text,
                "answer": prompt.answer,
                "response": response.text,
                "extracted": outcome.answer,
                "correct": outcome.correct,
                "length": len(response.sample.response_ids),
                "finish": response.sample.finish,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(temporary, path)
