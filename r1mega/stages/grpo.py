"""Reinforcement learning with group-relative advantages: R1-Zero's stage, and with other rewards R1's.

An update is one optimizer step. A rollout answers `prompts_per_rollout` prompts `group_size` times with one set of weights and is
split into `updates_per_rollout` minibatches of whole groups, each trained on once. `update` is everywhere the number of updates that are
done, so the index of the next; the row of an update has the number that it makes.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r1mega import heartbeat
from r1mega.config.base import at, largest
from r1mega.config.stages import Grpo, PromptShare
from r1mega.data.sources import load_prompts
from r1mega.data.templates import encode
from r1mega.errors import UserError
from r1mega.megatron.checkpoint import Checkpoints
from r1mega.megatron.policy import LocalBatch, NotFinite, Policy
from r1mega.megatron.reward_model import RewardModel
from r1mega.pipeline import ranks
from r1mega.pipeline.context import StageContext, Stopped
from r1mega.pipeline.model_folder import ModelFolder
from r1mega.report.plot import draw
from r1mega.rollout.ask import Question, read
from r1mega.stages.benchmark import Benchmark
from r1mega.stages.engines import opened
from r1mega.stages.evaluate import flat
from r1mega.stages.groups import Groups, leaves_nothing
from r1mega.stages.grpo_loss import GrpoLoss, loss_metrics
from r1mega.stages.minibatch import DrawnBy, Judgement, Minibatch, Rollout
from r1mega.stages.schedule import crossed, learning_rate
from r1mega.stages.scoring import Scorer
from r1mega.stages.training import export, restore
from r1mega.stages.trust import Decision, Guard, Part, measured


def run(ctx: StageContext) -> dict[str, Any]:
    """Train the stage's model and leave it as a Hugging Face folder; returns the last evaluation and the last update's metrics."""
    stage = ctx.stage
    assert isinstance(stage, Grpo)
    model = ModelFolder(ctx.model_dir(stage.model))
    policy = Policy(model.arch, ctx.layout, stage.train, stage.optimizer, ctx.seed)
    with ExitStack() as stack:
        loop = GrpoLoop(ctx, stage, model, policy, stack)
        first = loop.restore()
        if first == 0 and stage.evaluation and stage.evaluation.at_start:
            loop.evaluate(update=0)
        for update in range(first, stage.updates, stage.updates_per_rollout):
            for row in loop.roll_out_and_train(update):
                ctx.progress.update(row["update"], stage.updates, _headline(row))
                ctx.metrics.write(row)
                loop.checkpoints.poll()
            loop.finish_rollout(min(update + stage.updates_per_rollout, stage.updates))
            loop.stop_if_asked(min(update + stage.updates_per_rollout, stage.updates))
        loop.checkpoints.wait()
        summary = loop.last_metrics | (flat(loop.evaluations) if loop.evaluations else {})
    export(ctx, model, policy.exchange.gather(getattr(torch, stage.train.dtype)), getattr(torch, stage.export_dtype))
    if ctx.rank == 0:
        draw(ctx.dir, f"{ctx.recipe.name}: {ctx.name}")
    return summary


class GrpoLoop:
    """What lives as long as the stage: policy, reference, engine, judges, benchmarks."""

    def __init__(self, ctx: StageContext, stage: Grpo, model: ModelFolder, policy: Policy, stack: ExitStack) -> None:
        self.ctx, self.stage, self.model, self.policy = ctx, stage, model, policy
        room = model.prompt_room(largest(stage.sampling.max_new_tokens))
        self.questions = {name: _questions(prompts, model, room) for name, prompts in stage.prompts.items()}
        suites = stage.evaluation.suites if stage.evaluation else {}
        self.benchmarks = [
            stack.enter_context(Benchmark(name, suite, model, ctx.seed, ctx.recipe.run.judges)) for name, suite in suites.items()
        ]
        self.engine = opened(ctx, model.path, stack)
        with model.open() as reader:
            policy.exchange.load(reader.read)
        rewarding = {name: RewardModel(policy, ctx.reward_model_dir(reward.model)) for name, reward in stage.reward_models.items()}
        self.scorer = stack.enter_context(Scorer(stage, ctx.recipe.run.judges, rewarding, model.tokenizer))
        recorded = ctx.recipe.rollout.routing_replay != "off"
        self.groups = Groups(stage, self.questions, model.stop_token_ids, ctx.seed, ctx.name, self.scorer.begin, recorded)
        self.reference = policy.host_copy() if largest(stage.objective.kl_coef) > 0 else None
        self.guard = Guard(ctx, stage, policy, self.engine, [one for questions in self.questions.values() for one in questions])
        self.checkpoints = Checkpoints(policy, ctx.dir / "checkpoints")
        self.evaluations: dict[str, dict[str, Any]] = {}
        self.last_metrics: dict[str, Any] = {}
        self._served = self._drawn_by = DrawnBy(-1)
        self._saved = 0

    # -------------------------------------------------------- one rollout

    def roll_out_and_train(self, update: int) -> Iterator[dict[str, Any]]:
        """One rollout with the current weights, then its minibatches; yields a metrics row per update."""
        stage = self.stage
        rollout = self._roll_out(update)
        if update != self._saved:
            # The weights are still those of the last update: the rollout is abandoned, and drawn again. One that began at a
            # checkpoint is trained on, or attempts that are short would never get any further.
            self.stop_if_asked(update)
        size = stage.prompts_per_rollout // stage.updates_per_rollout
        count = min(stage.updates_per_rollout, stage.updates - update)
        replays = self.ctx.recipe.rollout.routing_replay == "rollout"
        minibatches = [Minibatch(rollout, slice(size * i, size * (i + 1)), stage.objective, replays) for i in range(count)]
        temperature = at(stage.sampling.temperature, update)
        with _timed(rollout.seconds, "logprobs"):
            batches = [self.policy.microbatches(minibatch.sequences) for minibatch in minibatches]
            self._add_logprobs(batches, temperature, rollout.drawn_by)
        trusted = self._trusted(update, [Part(minibatch.samples, local) for minibatch, local in zip(minibatches, batches, strict=True)])
        for index, (minibatch, local) in enumerate(zip(minibatches, batches, strict=True)):
            begin = time.perf_counter()
            known = index > 0 or self._asks_ahead(rollout.drawn_by)
            self.last_metrics = self._train(minibatch, local, update + index, trusted.corrects, known)
            seconds = rollout.seconds | {"train": time.perf_counter() - begin}
            rollout.seconds = {}
            row = self.last_metrics | (trusted.row if index == 0 else {})
            yield {"update": update + index + 1, **row, **{f"seconds/{name}": value for name, value in seconds.items()}}

    def _train(self, minibatch: Minibatch, local: list[LocalBatch], update: int, corrects: bool, known: bool) -> dict[str, Any]:
        """One optimizer step and what there is to say of it. `known`: whether `local` has the old log-probs already."""
        stage, count = self.stage, len(minibatch.sequences)
        rate = learning_rate(stage.optimizer, update, stage.updates)
        # The weights that drew an answer met it in the pass for its old log-probs, where there was one, or do in this step.
        routing = self.policy.routing_disagreement(local) if known else {}
        try:
            loss = GrpoLoss(stage.objective, update, corrects, count, self.policy.over_context)
            step = self.policy.step(local, loss, rate, at(stage.sampling.temperature, update))
        except NotFinite as error:
            raise self._stopped(minibatch, update, error) from None
        routing = routing or self.policy.routing_disagreement(local)
        return (
            minibatch.metrics(stage.difficulty)
            | loss_metrics(step.sums, step.peaks)
            | measured(self.policy, local, count).measures()
            | {f"routing_gap/{name}": value for name, value in routing.items()}
            | self._age(minibatch, update)
            | {"lr": rate, "grad_norm": step.grad_norm}
        )

    def _roll_out(self, update: int) -> Rollout:
        """The answers that the updates from `update` on train on; with staleness, the next ones are being drawn when this returns."""
        stage, seconds = self.stage, dict[str, float]()
        with nullcontext() if self.groups.drawing else self._engine_with(update, seconds):
            if not self.groups.drawing:
                self._begin(update, seconds)
            with _timed(seconds, "generate"):
                taken = self.groups.take(self.engine, update)
        drawn_by = self._drawn_by
        if stage.staleness and not leaves_nothing(stage, update):
            with self._engine_with(update, seconds):
                self._begin(update + stage.updates_per_rollout, seconds)
        kinds, questions = [group.kind for group in taken], [group.question for group in taken]
        groups = read(questions, [[sample for sample in group.samples if sample] for group in taken], self.model.tokenizer)
        with _timed(seconds, "judge"):
            judgement = self.scorer.judge(taken, groups, update)
        self._check_judged(judgement, update)
        off_policy = stage.partial is not None or drawn_by.version != update
        return Rollout(kinds, questions, groups, judgement, seconds, drawn_by if off_policy else None)

    def _begin(self, update: int, seconds: dict[str, float]) -> None:
        """Begin the rollout at an update with the weights that the engine has."""
        self._drawn_by = self._served
        with _timed(seconds, "generate"):
            self.groups.begin(self.engine, update)

    @contextmanager
    def _engine_with(self, version: int, seconds: dict[str, float]) -> Iterator[None]:
        """The engine, idle and with the policy's current weights; one on the trainer's GPUs has their memory until the block ends."""
        if not self.engine.colocated:
            with _timed(seconds, "sync"):
                self._sync(version)
            yield
            return
        # The policy's weights go last: until they are sent, those and the engine's share the memory that the rest of the trainer leaves.
        with ExitStack() as moved:
            with _timed(seconds, "sync"):
                moved.enter_context(self.policy.without_training_state())
                self._sync(version)
                moved.enter_context(self.policy.without_weights())
            yield
            self.engine.sleep()
            self._served = DrawnBy(-1)

    def _trusted(self, update: int, parts: Sequence[Part]) -> Decision:
        """Hold the rollout against the mismatch budget. UserError, the state saved and nothing trained on, where that says stop."""
        found = self.guard.hold(update, parts, self.groups.sampling(update))
        if found.stop is not None:
            self.ctx.metrics.write({"update": update + 1, **found.row})
            self._save_early(update)
            raise UserError(
                f"stage {self.ctx.name}, update {update + 1}: {found.stop}; nothing was trained on this rollout, and the same command "
                f"goes on from {self.ctx.dir / 'checkpoints'}"
            )
        return found

    def _sync(self, version: int) -> None:
        """Give the engine, which is idle, the policy's current weights."""
        if self._served.version == version:
            return
        with self.guard.syncing():
            if self.stage.staleness or self.engine.colocated:
                # While the engine draws, the policy moves on or is not there: a lost server and the old log-probs need these weights.
                weights = self.policy.host_copy()
                self.engine.sync(self.policy.exchange.over(weights), version)
                self._served = DrawnBy(version, weights)
            else:
                self.engine.sync(self.policy.exchange, version)
                self._served = DrawnBy(version)

    def _age(self, minibatch: Minibatch, update: int) -> dict[str, float]:
        """How far the weights have moved since they drew; nothing where every rollout is drawn by the weights that it trains."""
        return minibatch.age(update) if self.stage.partial or self.stage.staleness else {}

    def _check_judged(self, judgement: Judgement, update: int) -> None:
        missing = judgement.rewards.isnan().float().mean().item()
        if missing > self.stage.not_judged_limit:
            raise UserError(
                f"stage {self.ctx.name}, update {update + 1}: {missing:.1%} of the rewards could not be judged, more than not_judged_limit="
                f"{self.stage.not_judged_limit:g}; first reason: {judgement.reasons[0]}"
            )

    def _asks_ahead(self, drawn_by: DrawnBy | None) -> bool:
        """Whether a rollout's first minibatch needs its old log-probs before it is trained on."""
        return drawn_by is not None or self.guard.asks_ahead

    def _add_logprobs(self, batches: Sequence[Sequence[LocalBatch]], temperature: float, drawn_by: DrawnBy | None) -> None:
        """Reference log-probs of every micro-batch, and those of the policy that drew it, before the first of its minibatches moves it.

        Where the weights as they are drew everything, the first minibatch is trained on with these: its old log-probs are those of the
        training forward, unless the mismatch budget asks for them ahead. Otherwise they come from the weights that drew the rollout, and
        for tokens of versions before, whose weights are gone, from the engine, which recorded them as it drew.
        """
        everything = [batch for local in batches for batch in local]
        later = [batch for local in batches[0 if self._asks_ahead(drawn_by) else 1 :] for batch in local]
        if later:
            weights = drawn_by.weights if drawn_by else None
            with self.policy.holding(weights) if weights is not None else nullcontext():
                _add("old_logprobs", later, self.policy.logprobs(later, temperature))
        for batch in later if drawn_by else []:
            old = batch.extras.get("old_logprobs")
            if old is not None:
                batch.extras["old_logprobs"] = torch.where(batch.extras["earlier"], batch.extras["rollout_logprobs"], old)
        if self.reference is not None:
            with self.policy.holding(self.reference):
                _add("ref_logprobs", everything, self.policy.logprobs(everything, temperature, replay=False))

    def _stopped(self, minibatch: "Minibatch", update: int, error: NotFinite) -> UserError:
        """Save the batch that broke the update and say where."""
        path = self.ctx.dir / f"not-finite-update-{update + 1}.json"
        if self.ctx.rank == 0:
            path.write_text(json.dumps(minibatch.record()), encoding="utf-8")
        return UserError(f"stage {self.ctx.name}, update {update + 1}: {error}; the step was not applied, its batch is in {path}")

    # -------------------------------------------------------- between rollouts

    def finish_rollout(self, update: int) -> None:
        """Refresh the reference, evaluate and save where they are due after `update` updates."""
        stage = self.stage
        if self.reference is not None and crossed(update, stage.updates_per_rollout, stage.reference_refresh):
            self.reference = self.policy.host_copy()
        last = update >= stage.updates
        if stage.evaluation and (last or crossed(update, stage.updates_per_rollout, stage.evaluation.every)):
            self.evaluate(update)
        if not last and crossed(update, stage.updates_per_rollout, stage.save_every):
            self.save(update)

    def evaluate(self, update: int) -> None:
        """Measure the current weights on every benchmark and write a metrics row."""
        self.groups.settle()
        folder = self.ctx.dir / "samples" / f"update-{update:06d}"
        with self._engine_with(update, {}):
            begin = time.perf_counter()
            self.evaluations = {one.name: one.measure(self.engine, folder / f"{one.name}.jsonl.gz") for one in self.benchmarks}
        row = {f"eval/{suite}/{key}": value for suite, found in self.evaluations.items() for key, value in found.items()}
        self.ctx.metrics.write({"update": update, **row, "seconds/evaluate": time.perf_counter() - begin})
        for suite, found in self.evaluations.items():
            value = found["pass@1"]
            self.ctx.progress.note(
                f"{self.ctx.name}: update {update}: {suite} pass@1 {value['value']:.3f} [{value['ci95'][0]:.3f}, {value['ci95'][1]:.3f}]"
            )

    def save(self, update: int) -> None:
        """Write a checkpoint that `restore` goes on from."""
        self.checkpoints.save(f"update-{update:06d}", {"update": update}, self.reference)
        self._saved = update

    def stop_if_asked(self, update: int) -> None:
        """Save and leave the stage when the run is asked to, unless it is done anyway; `update` updates are behind it."""
        if update >= self.stage.updates or not self.ctx.stop_asked():
            return
        self._save_early(update)
        raise Stopped

    def _save_early(self, update: int) -> None:
        """Write the checkpoint that the stage goes on from, before its time.

        Not in the middle of responses that are drawn in pieces, which no checkpoint holds: then the last one is gone on from.
        """
        if update and update != self._saved and not self.stage.partial:
            self.save(update)
        self.checkpoints.wait()

    def restore(self) -> int:
        """Load the newest checkpoint if there is one; returns the update to go on with."""
        done = self._saved = restore(self.ctx, self.checkpoints, self.reference)
        for update in range(0, done, self.stage.updates_per_rollout):
            self.groups.skip(update)
        return done


def _questions(prompts: PromptShare, model: ModelFolder, room: int) -> list[Question]:
    found = ranks.shared(lambda: load_prompts(prompts, Path()))
    encoded = encode(found, prompts.template, model.tokenizer, room)
    return [Question(prompt, ids) for prompt, ids in zip(found, encoded, strict=True)]


def _add(name: str, batches: Sequence[LocalBatch], values: Sequence[Tensor] | None) -> None:
    """Keep per-token values with their micro-batches; only the last pipeline stage has any, and only it computes the loss."""
    for batch, value in zip(batches, values or [], strict=False):
        batch.extras[name] = value


def _headline(row: dict[str, Any]) -> dict[str, float]:
    return {"reward": row["reward/mean"], "length": row["response_length/mean"], "kl": row["kl"], "gap": row["rollout_gap/max"]}


@contextmanager
def _timed(seconds: dict[str, float], name: heartbeat.Phase) -> Iterator[None]:
    begin = time.perf_counter()
    with heartbeat.phase(name):
        yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begin
