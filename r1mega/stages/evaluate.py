"""Measure a model on benchmarks: as a stage, inside a training stage, and for any Hugging Face folder."""

import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist

from r1mega.config.base import at
from r1mega.config.evaluation import Gate, Suite
from r1mega.config.rollout import Reward, Rollout
from r1mega.config.stages import Evaluate
from r1mega.data.sources import load_prompts
from r1mega.data.templates import encode
from r1mega.errors import UserError
from r1mega.evaluation.metrics import Outcome, estimate, summary
from r1mega.pipeline import ranks
from r1mega.pipeline.context import StageContext
from r1mega.pipeline.model_folder import ModelFolder
from r1mega.rewards.imports import load_function
from r1mega.rewards.judge import Judge, Verdict
from r1mega.rewards.worker import NO_VALUE
from r1mega.rollout.ask import Question, Response, ask
from r1mega.rollout.engine import Engine, SamplingParams
from r1mega.rollout.open import open_engine

_JUDGES = 1
"""Judge processes beside each engine: the functions of a suite are judged by rank 0 while nothing else runs."""


class Benchmark:
    """One suite, ready to be asked again and again: prompts encoded, judge processes running on rank 0."""

    def __init__(self, name: str, suite: Suite, model: ModelFolder, seed: int) -> None:
        self.name, self.suite, self.model, self.seed = name, suite, model, seed
        prompts = load_prompts(suite.prompts, Path())
        room = model.prompt_room(at(suite.sampling.max_new_tokens, 0))
        self.questions = [
            Question(prompt, ids)
            for prompt, ids in zip(prompts, encode(prompts, suite.prompts.template, model.tokenizer, room), strict=True)
        ]
        functions = {"judge": suite.judge, **{f"measure_{key}": path for key, path in suite.measures.items()}}
        self._judge = Judge({key: Reward(function=path) for key, path in functions.items()}, _JUDGES) if dist.get_rank() == 0 else None
        self._extract = load_function(suite.extract, arguments=1) if suite.extract else None

    def __enter__(self) -> "Benchmark":
        return self

    def __exit__(self, *_: object) -> None:
        if self._judge is not None:
            self._judge.close()

    def measure(self, engine: Engine) -> dict[str, Any]:
        """Metrics of the engine's current weights, the same on every rank."""
        sampling = SamplingParams(at(self.suite.sampling.temperature, 0), self.suite.sampling.top_p, self.model.stop_token_ids)
        cap = int(at(self.suite.sampling.max_new_tokens, 0))
        groups = ask(engine, self.questions, self.suite.k, sampling, cap, f"{self.seed}/{self.name}", self.model.tokenizer)
        return ranks.shared(lambda: self._judged(groups))

    def _judged(self, groups: Sequence[Sequence[Response]]) -> dict[str, Any]:
        assert self._judge is not None, "judging is rank 0's"
        flat = [(question.prompt, response) for question, group in zip(self.questions, groups, strict=True) for response in group]
        verdicts = self._judge.judge([(prompt, response.text) for prompt, response in flat])
        self._check_judged("judge", [verdict["judge"].reason for verdict in verdicts])
        k = self.suite.k
        outcomes = [self._outcome(response, verdict) for (_, response), verdict in zip(flat, verdicts, strict=True)]
        lengths = [float(len(response.sample.response_ids)) for _, response in flat]
        measured = summary([outcomes[start : start + k] for start in range(0, len(flat), k)], self.seed)
        measured["response_length"] = estimate(_means([lengths[start : start + k] for start in range(0, len(flat), k)]), self.seed)
        measured["truncated"] = statistics.fmean(response.sample.finish == "length" for _, response in flat)
        for key in self.suite.measures:
            found = [verdict[f"measure_{key}"] for verdict in verdicts]
            self._check_judged(f"measures.{key}", [None if verdict.reason in NO_VALUE else verdict.reason for verdict in found])
            values = [verdict.value for verdict in found]
            means = _means([[v for v in values[start : start + k] if v is not None] for start in range(0, len(flat), k)])
            measured[key] = estimate(means, self.seed) if means else None
        return measured

    def _check_judged(self, key: str, reasons: Sequence[str | None]) -> None:
        """A function that fails says nothing about the model."""
        failed = [reason for reason in reasons if reason is not None]
        if len(failed) > self.suite.not_judged_limit * len(reasons):
            raise UserError(
                f"suite {self.name}: {key} could not judge {len(failed) / len(reasons):.1%} of the answers, more than not_judged_limit="
                f"{self.suite.not_judged_limit:g}; first reason: {failed[0]}"
            )

    def _outcome(self, response: Response, verdict: Mapping[str, Verdict]) -> Outcome:
        value = verdict["judge"].value
        return Outcome(None if value is None else value > 0.5, self._extract(response.text) if self._extract else None)


def _means(groups: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(group) for group in groups if group]


def run(ctx: StageContext) -> dict[str, Any]:
    """The stage: every suite on the weights of one artifact; fails when a gate does not hold."""
    stage = ctx.stage
    assert isinstance(stage, Evaluate)
    model = ModelFolder(ctx.model_dir(stage.model))
    metrics = measure_folder(model, stage.suites, ctx.recipe.rollout, ctx.seed)
    ctx.metrics.write({"update": 0} | {f"eval/{suite}/{key}": value for suite, found in metrics.items() for key, value in found.items()})
    check_gates(stage.gates, metrics, ctx.name)
    return flat(metrics)


def measure_folder(model: ModelFolder, suites: Mapping[str, Suite], rollout: Rollout, seed: int) -> dict[str, dict[str, Any]]:
    """Metrics of a model folder on each suite."""
    with ExitStack() as stack:
        benchmarks = [stack.enter_context(Benchmark(name, suite, model, seed)) for name, suite in suites.items()]
        engine = open_engine(rollout, model.path)
        stack.callback(engine.close)
        with model.open() as reader:
            engine.load_weights(reader.tensors(model.arch), version=0)
        return {benchmark.name: benchmark.measure(engine) for benchmark in benchmarks}


def evaluate_directory(folder: Path, suite: Suite, seed: int, threads: int) -> dict[str, Any]:
    """Metrics of one Hugging Face folder, in this process."""
    from r1mega.megatron import platform

    platform.start("cpu", threads)
    try:
        return measure_folder(ModelFolder(folder), {"suite": suite}, Rollout(), seed)["suite"]
    finally:
        platform.stop()


def flat(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Metrics of a stage's summary: bare names for a single suite, `<suite>/<name>` for several."""
    if len(metrics) == 1:
        return dict(next(iter(metrics.values())))
    return {f"{suite}/{name}": value for suite, found in metrics.items() for name, value in found.items()}


def check_gates(gates: Sequence[Gate], metrics: Mapping[str, Mapping[str, Any]], stage: str) -> None:
    """Raises UserError for the first gate that does not hold, with the value that was measured."""
    known = flat(metrics)
    for gate in gates:
        found = known.get(gate.metric)
        value = found["value"] if isinstance(found, dict) else found
        if value is None or math.isnan(value):
            raise UserError(f"stage {stage}: gate on {gate.metric!r}, which was not measured; measured: {', '.join(known)}")
        if gate.min is not None and value < gate.min:
            raise UserError(f"stage {stage}: gate not passed: {gate.metric} is {value:.4g}, less than {gate.min:g}")
        if gate.max is not None and value > gate.max:
            raise UserError(f"stage {stage}: gate not passed: {gate.metric} is {value:.4g}, more than {gate.max:g}")
