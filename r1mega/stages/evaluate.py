"""Measure a model on benchmarks: as a stage, inside a training stage, and for any Hugging Face folder."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r1mega import heartbeat
from r1mega.config.evaluation import Evaluation, Gate, Suite
from r1mega.config.rollout import Rollout
from r1mega.config.stages import Evaluate
from r1mega.errors import UserError
from r1mega.pipeline import ranks
from r1mega.pipeline.context import StageContext
from r1mega.pipeline.metrics import read_metrics
from r1mega.pipeline.model_folder import ModelFolder
from r1mega.rollout.engine import Engine
from r1mega.rollout.open import open_engine
from r1mega.stages.benchmark import Benchmark
from r1mega.stages.engines import opened
from r1mega.weights.source import Mapped


def run(ctx: StageContext) -> dict[str, Any]:
    """The stage: every suite on the weights of every artifact; fails when a gate does not hold.

    A model that was measured before an interruption is not measured again.
    """
    stage = ctx.stage
    assert isinstance(stage, Evaluate)
    measured = ranks.shared(lambda: _measured_before(ctx, stage))
    if measured:
        ctx.metrics.resume(0)
    with ExitStack() as judges:
        benchmarks: list[Benchmark] = []
        for label, reference in stage.models.items():
            if label not in measured:
                model = ModelFolder(ctx.model_dir(reference))
                benchmarks = benchmarks or [judges.enter_context(one) for one in _benchmarks(ctx, stage.suites, model)]
                measured[label] = _measured(ctx, benchmarks, model, label)
                ctx.metrics.write({"update": 0, "model": label} | _row(measured[label]))
            ctx.progress.update(len(measured), len(stage.models), {})
            for suite, values in measured[label].items():
                ctx.progress.note(f"{ctx.name}: {label}: {suite} pass@1 {values['pass@1']['value']:.3f}")
    by_name = {f"{label}/{suite}": found for label, suites in measured.items() for suite, found in suites.items()}
    if len(stage.models) == 1:
        by_name = next(iter(measured.values()))
    check_gates(stage.gates, by_name, ctx.name)
    return flat(by_name)


def _benchmarks(ctx: StageContext, suites: Mapping[str, Suite], model: ModelFolder) -> list[Benchmark]:
    return [Benchmark(name, suite, model, ctx.seed, ctx.recipe.run.judges) for name, suite in suites.items()]


def _measured(ctx: StageContext, benchmarks: Sequence[Benchmark], model: ModelFolder, label: str) -> dict[str, dict[str, Any]]:
    """Metrics of a model folder on each benchmark."""
    with ExitStack() as stack:
        engine = opened(ctx, model.path, stack)
        with heartbeat.phase("sync"):
            engine.sync(model, version=0)
        for benchmark in benchmarks:
            benchmark.use(model)
        return _answered(ctx, benchmarks, engine, label)


def _answered(ctx: StageContext, benchmarks: Sequence[Benchmark], engine: Engine, label: str) -> dict[str, dict[str, Any]]:
    """Metrics of an engine's weights; what was answered goes to `samples/<label>` in the stage's folder."""
    folder = ctx.dir / "samples" / label
    return {benchmark.name: benchmark.measure(engine, folder / f"{benchmark.name}.jsonl.gz") for benchmark in benchmarks}


def _measured_before(ctx: StageContext, stage: Evaluate) -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in read_metrics(ctx.dir / "metrics.jsonl"):
        if row.get("model") in stage.models:
            suites: dict[str, dict[str, Any]] = {name: {} for name in stage.suites}
            for key, value in row.items():
                if key.startswith("eval/"):
                    suite, _, metric = key.removeprefix("eval/").partition("/")
                    suites[suite][metric] = value
            found[row["model"]] = suites
    return found


def _row(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"eval/{suite}/{key}": value for suite, found in metrics.items() for key, value in found.items()}


def evaluate_weights(
    ctx: StageContext, evaluation: Evaluation | None, model: ModelFolder, weights: Mapping[str, Tensor], dtype: torch.dtype, update: int
) -> dict[str, dict[str, Any]]:
    """Metrics of a training stage's weights after `update` updates, written as a row; nothing where the stage evaluates nothing."""
    if evaluation is None:
        return {}
    with ExitStack() as stack:
        engine = opened(ctx, model.path, stack)
        # What is measured is what is shipped: the weights in the dtype of the files.
        with heartbeat.phase("sync"):
            engine.sync(Mapped(model.arch, weights, dtype), version=0)
        benchmarks = [stack.enter_context(one) for one in _benchmarks(ctx, evaluation.suites, model)]
        found = _answered(ctx, benchmarks, engine, f"update-{update:06d}")
    ctx.metrics.write({"update": update} | _row(found))
    return found


def evaluate_directory(
    folder: Path, suite: Suite, seed: int, threads: int = 1, judges: int = 1, responses: Path | None = None
) -> dict[str, Any]:
    """Metrics of one Hugging Face folder, in this process. `responses`: file (.jsonl.gz) for what was answered."""
    from r1mega.megatron import platform

    platform.start("cpu", threads)
    try:
        model = ModelFolder(folder)
        with ExitStack() as stack:
            engine = open_engine(Rollout(), model.path)
            stack.callback(engine.close)
            engine.sync(model, version=0)
            return stack.enter_context(Benchmark("suite", suite, model, seed, judges)).measure(engine, responses)
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
        value = found.get("value") if isinstance(found, dict) else found
        if value is None or math.isnan(value):
            raise UserError(f"stage {stage}: gate on {gate.metric!r}, which was not measured; measured: {', '.join(known)}")
        if gate.min is not None and value < gate.min:
            raise UserError(f"stage {stage}: gate not passed: {gate.metric} is {value:.4g}, less than {gate.min:g}")
        if gate.max is not None and value > gate.max:
            raise UserError(f"stage {stage}: gate not passed: {gate.metric} is {value:.4g}, more than {gate.max:g}")
