"""r1mega's side of `grpo_vs_trl.py`: one GRPO stage, driven over stdin and stdout, one JSON object a line.

    {"op": "check", "completion_ids": [[...], ...]}  -> {"loss", "grad_norm", ...} of exactly these samples
    {"op": "update"}                                 -> {"update": seconds, "phases": {...}, "cpu": seconds} of the next update

An update is what the stage does: weights to the engine, generation, reward, advantages, packing, reference log-probs, forward, backward,
step, metrics. Started by hand it is one process; under torchrun its ranks share the experts.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from r1mega import env
from r1mega.config.schema import Recipe
from r1mega.megatron import platform
from r1mega.pipeline.context import StageContext
from r1mega.pipeline.metrics import MetricsWriter
from r1mega.pipeline.rundir import RunDirectory
from r1mega.pipeline.worker import opened
from r1mega.report.progress import Progress
from r1mega.rollout.engine import Engine, Request, Sample, SamplingParams
from r1mega.rollout.pool import Engines
from r1mega.weights.source import WeightSource


def recipe(options: argparse.Namespace, work: dict[str, Any], ranks: int) -> Recipe:
    """The peer's settings, spelled as a recipe."""
    stage = {
        "kind": "grpo",
        "model": str(options.model),
        "prompts": {"source": {"kind": "jsonl", "path": str(options.prompts)}, "split": "all"},
        "rewards": {"odd": {"function": "odd_tokens:reward"}},
        "group_size": work["group"],
        "prompts_per_rollout": len(work["prompts"]),
        "updates_per_rollout": 1,
        "updates": 1_000_000,
        "sampling": {"temperature": 1.0, "max_new_tokens": max(work["lengths"])},
        "objective": {"clip": 10.0, "kl_coef": 1e-3},
        "optimizer": {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "clip_grad": 1.0},
        "train": {"chunk_tokens": options.chunk_tokens},
    }
    run = {"platform": "cpu", "ranks": ranks, "threads_per_rank": options.threads}
    return Recipe.model_validate({"name": "bench", "run": run, "layout": {"ep": options.ep}, "stages": {"grpo": stage}})


class _Numbered:
    """The stage's engine, told which sample of the workload each request is: ranks ask for shares of it, in an order of their own."""

    def __init__(self, engine: Engine, prompts: Sequence[tuple[int, ...]], group: int) -> None:
        self._engine, self._group = engine, group
        self._places = {prompt: place for place, prompt in enumerate(prompts)}
        assert len(self._places) == len(prompts), "prompts must differ"

    colocated = False

    def sync(self, source: WeightSource, version: int) -> None:
        self._engine.sync(source, version)

    def start(self, requests: Sequence[Request], sampling: SamplingParams) -> Callable[[], list[Sample]]:
        samples = self.generate(requests, sampling)
        return lambda: samples

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[Sample]:
        raise NotImplementedError

    def sleep(self) -> None:
        self._engine.sleep()

    def close(self) -> None:
        self._engine.close()

    def _numbers(self, requests: Sequence[Request]) -> list[int]:
        seen: Counter[tuple[int, ...]] = Counter()
        numbers = []
        for request in requests:
            numbers.append(self._places[request.prompt_ids] * self._group + seen[request.prompt_ids])
            seen[request.prompt_ids] += 1
        return numbers


class ForcedLengths(_Numbered):
    """Draws every response to its given length."""

    def __init__(self, engine: Engine, prompts: Sequence[tuple[int, ...]], group: int, lengths: Sequence[int]) -> None:
        super().__init__(engine, prompts, group)
        self._lengths = lengths

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[Sample]:
        forced = [replace(r, max_new_tokens=self._lengths[n]) for r, n in zip(requests, self._numbers(requests), strict=True)]
        return self._engine.generate(forced, replace(sampling, stop_token_ids=()))


class GivenSamples(_Numbered):
    """Draws nothing."""

    def __init__(self, engine: Engine, prompts: Sequence[tuple[int, ...]], group: int, completions: Sequence[Sequence[int]]) -> None:
        super().__init__(engine, prompts, group)
        self._completions = completions

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[Sample]:
        ids = [tuple(self._completions[number]) for number in self._numbers(requests)]
        return [Sample(r.prompt_ids, c, (0.0,) * len(c), "length", 0) for r, c in zip(requests, ids, strict=True)]


class Side:
    """The stage and the commands it answers. Every rank runs the same ones."""

    def __init__(self, options: argparse.Namespace, work: dict[str, Any], stack: ExitStack) -> None:
        from r1mega.megatron.policy import Policy
        from r1mega.pipeline.model_folder import ModelFolder
        from r1mega.stages.grpo import GrpoLoop

        ranks = env.ranks()
        run = RunDirectory(options.scratch, recipe(options, work, ranks.world_size))
        engines = stack.enter_context(Engines(partial(opened, run)))
        ctx = StageContext(run, "grpo", ranks.rank, ranks.world_size, MetricsWriter(run.path, enabled=False), Progress.silent(), engines)
        stage: Any = ctx.stage
        model = ModelFolder(options.model)
        self.policy = Policy(model.arch, ctx.layout, stage.train, stage.optimizer, ctx.seed)
        with ModelFolder(options.reference).open() as reader:
            self.policy.exchange.load(reader.read)
        reference = self.policy.host_copy()
        self.loop = GrpoLoop(ctx, stage, model, self.policy, stack)
        self.loop.reference = reference
        self.engine, self.group = self.loop.engine, work["group"]
        self.prompts = [question.ids for question in self.loop.questions]
        self.forced = ForcedLengths(self.engine, self.prompts, self.group, work["lengths"])
        self.updates = 0

    def update(self, command: dict[str, Any]) -> dict[str, Any]:
        self.loop.engine = self.forced
        begin, cpu = time.perf_counter(), time.process_time()
        row = self._next()
        total, cpu = time.perf_counter() - begin, time.process_time() - cpu
        seconds = {name.removeprefix("seconds/"): value for name, value in row.items() if name.startswith("seconds/")}
        return {"update": total, "phases": seconds, "cpu": cpu}

    def check(self, command: dict[str, Any]) -> dict[str, Any]:
        """Loss and gradient norm of given samples through the stage's own scoring, packing and loss; the weights stay as they are.

        The reference's log-probs stand in for the old policy's, so that ratio, clip and KL all matter.
        """
        from r1mega.megatron.policy import LocalBatch, Objective, StepResult

        step, results = self.policy.step, []

        def off_policy(batches: Sequence[LocalBatch], objective: Objective, lr: float, temperature: float = 1.0) -> StepResult:
            for batch in batches:
                batch.extras["old_logprobs"] = batch.extras["ref_logprobs"]
            results.append(step(batches, objective, 0.0, temperature))
            return results[-1]

        self.loop.engine = GivenSamples(self.engine, self.prompts, self.group, command["completion_ids"])
        self.policy.step = off_policy  # type: ignore[method-assign]
        try:
            row = self._next()
        finally:
            self.policy.step = step  # type: ignore[method-assign]
        found = {"loss": results[0].loss, "grad_norm": results[0].grad_norm, "prompt_ids": [list(ids) for ids in self.prompts]}
        return found | {name: row[name] for name in ("kl", "entropy", "ratio/max")}

    def _next(self) -> dict[str, Any]:
        (row,) = self.loop.roll_out_and_train(self.updates)
        self.updates += 1
        return row


def serve(operations: dict[str, Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """Answer rank 0's standard input until it ends."""
    from r1mega.pipeline import ranks

    answers = sys.stdout
    with redirect_stdout(sys.stderr):  # whatever libraries print is not an answer
        while line := ranks.shared(sys.stdin.readline):
            command = json.loads(line)
            found = operations[command["op"]](command)
            if "cpu" in found:
                found["cpu"] = sum(ranks.collected([found["cpu"]]))
            if env.ranks().rank == 0:
                print(json.dumps(found), file=answers, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of the policy")
    parser.add_argument("--reference", type=Path, required=True, help="Hugging Face folder of the reference")
    parser.add_argument("--workload", type=Path, required=True, help="JSON: prompts, group, lengths")
    parser.add_argument("--prompts", type=Path, required=True, help="the same prompts as JSON lines")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for what a stage may leave behind")
    parser.add_argument("--threads", type=int, default=1, help="threads of each rank")
    parser.add_argument("--ep", type=int, default=1, help="ranks that share the experts")
    parser.add_argument("--chunk-tokens", type=int, default=8192)
    options = parser.parse_args()
    work = json.loads(options.workload.read_text())
    platform.start("cpu", options.threads)
    with ExitStack() as stack:
        side = Side(options, work, stack)
        serve({"check": side.check, "update": side.update})
    platform.stop()


if __name__ == "__main__":
    main()
