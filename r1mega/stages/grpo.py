"""Reinforcement learning with group-relative advantages: R1-Zero's stage, and with other rewards R1's.

An update is one optimizer step. A rollout answers `prompts_per_rollout` prompts `group_size` times with one set of weights and is
split into `updates_per_rollout` minibatches of whole groups, each trained on once.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r1mega.config.base import at, largest
from r1mega.config.stages import Grpo, PromptShare
from r1mega.config.training import GrpoObjective
from r1mega.data.mixture import Mixture
from r1mega.data.sources import load_prompts
from r1mega.data.templates import encode
from r1mega.errors import UserError
from r1mega.megatron.checkpoint import Checkpoints
from r1mega.megatron.policy import LocalBatch, NotFinite, Policy, TokenLoss
from r1mega.megatron.reward_model import RewardModel
from r1mega.objectives.grpo import policy_loss
from r1mega.pipeline import ranks
from r1mega.pipeline.context import StageContext, Stopped
from r1mega.pipeline.model_folder import ModelFolder
from r1mega.report.plot import draw
from r1mega.rollout.ask import Question, ask
from r1mega.rollout.engine import SamplingParams
from r1mega.stages.benchmark import Benchmark
from r1mega.stages.engines import opened
from r1mega.stages.evaluate import flat
from r1mega.stages.minibatch import Judgement, Minibatch, Rollout
from r1mega.stages.schedule import learning_rate
from r1mega.stages.scoring import Scorer
from r1mega.stages.training import export, restore


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
        sizes = {name: len(questions) for name, questions in self.questions.items()}
        self.mixture = Mixture(sizes, {name: prompts.share for name, prompts in stage.prompts.items()}, ctx.seed)
        suites = stage.evaluation.suites if stage.evaluation else {}
        self.benchmarks = [
            stack.enter_context(Benchmark(name, suite, model, ctx.seed, ctx.recipe.run.judges)) for name, suite in suites.items()
        ]
        self.engine = opened(ctx, model.path, stack)
        with model.open() as reader:
            policy.exchange.load(reader.read)
        rewarding = {name: RewardModel(policy, ctx.reward_model_dir(reward.model)) for name, reward in stage.reward_models.items()}
        self.scorer = stack.enter_context(Scorer(stage, ctx.recipe.run.judges, rewarding, model.tokenizer))
        self.reference = policy.host_copy() if largest(stage.objective.kl_coef) > 0 else None
        self.checkpoints = Checkpoints(policy, ctx.dir / "checkpoints")
        self.evaluations: dict[str, dict[str, Any]] = {}
        self.last_metrics: dict[str, Any] = {}
        self._synced = -1
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
        minibatches = [Minibatch(rollout, slice(size * i, size * (i + 1)), stage.objective) for i in range(count)]
        temperature = at(stage.sampling.temperature, update)
        with _timed(rollout.seconds, "logprobs"):
            batches = [self.policy.microbatches(minibatch.sequences) for minibatch in minibatches]
            self._add_logprobs(batches, temperature)
        for index, (minibatch, local) in enumerate(zip(minibatches, batches, strict=True)):
            rate = learning_rate(stage.optimizer, update + index, stage.updates)
            begin = time.perf_counter()
            try:
                step = self.policy.step(local, _Loss(stage.objective, update + index), rate, temperature)
            except NotFinite as error:
                raise self._stopped(minibatch, update + index, error) from None
            seconds = rollout.seconds | {"train": time.perf_counter() - begin}
            rollout.seconds = {}
            self.last_metrics = (
                minibatch.metrics(stage.difficulty) | _loss_metrics(step.sums, step.peaks) | {"lr": rate, "grad_norm": step.grad_norm}
            )
            yield {"update": update + index + 1, **self.last_metrics, **{f"seconds/{name}": value for name, value in seconds.items()}}

    def _roll_out(self, update: int) -> Rollout:
        stage, seconds = self.stage, dict[str, float]()
        with _timed(seconds, "sync"):
            self._sync(update)
        drawn = self.mixture.draw(stage.prompts_per_rollout, update)
        kinds, questions = [kind for kind, _ in drawn], [self.questions[kind][place] for kind, place in drawn]
        sampling = SamplingParams(at(stage.sampling.temperature, update), at(stage.sampling.top_p, update), self.model.stop_token_ids)
        cap = int(at(stage.sampling.max_new_tokens, update))
        with _timed(seconds, "generate"):
            seed = f"{self.ctx.seed}/{self.ctx.name}/{update}"
            groups = ask(self.engine, questions, stage.group_size, sampling, cap, seed, self.model.tokenizer)
        with _timed(seconds, "judge"):
            judgement = self.scorer.judge(kinds, questions, groups, update)
        self._check_judged(judgement, update)
        return Rollout(kinds, questions, groups, judgement, seconds)

    def _sync(self, version: int) -> None:
        """Give the engine the policy's current weights."""
        if self._synced == version:
            return
        self.engine.sync(self.policy.exchange, version)
        self._synced = version

    def _check_judged(self, judgement: Judgement, update: int) -> None:
        missing = judgement.rewards.isnan().float().mean().item()
        if missing > self.stage.not_judged_limit:
            raise UserError(
                f"stage {self.ctx.name}, update {update + 1}: {missing:.1%} of the rewards could not be judged, more than not_judged_limit="
                f"{self.stage.not_judged_limit:g}; first reason: {judgement.reasons[0]}"
            )

    def _add_logprobs(self, batches: Sequence[Sequence[LocalBatch]], temperature: float) -> None:
        """Reference log-probs of every micro-batch, and the policy's own before the first of its minibatches moves it.

        The first minibatch is trained on with the very weights that drew it: its old log-probs are those of the training forward.
        """
        everything = [batch for local in batches for batch in local]
        later = [batch for local in batches[1:] for batch in local]
        if later:
            _add("old_logprobs", later, self.policy.logprobs(later, temperature))
        if self.reference is not None:
            with self.policy.holding(self.reference):
                _add("ref_logprobs", everything, self.policy.logprobs(everything, temperature))

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
        if self.reference is not None and _crossed(update, stage.updates_per_rollout, stage.reference_refresh):
            self.reference = self.policy.host_copy()
        last = update >= stage.updates
        if stage.evaluation and (last or _crossed(update, stage.updates_per_rollout, stage.evaluation.every)):
            self.evaluate(update)
        if not last and _crossed(update, stage.updates_per_rollout, stage.save_every):
            self.save(update)

    def evaluate(self, update: int) -> None:
        """Measure the current weights on every benchmark and write a metrics row."""
        self._sync(update)
        begin = time.perf_counter()
        self.evaluations = {
            benchmark.name: benchmark.measure(self.engine, self.ctx.dir / "samples" / f"update-{update:06d}" / f"{benchmark.name}.jsonl.gz")
            for benchmark in self.benchmarks
        }
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
        if update and update != self._saved:
            self.save(update)
        self.checkpoints.wait()
        raise Stopped

    def restore(self) -> int:
        """Load the newest checkpoint if there is one; returns the update to go on with."""
        done = self._saved = restore(self.ctx, self.checkpoints, self.reference)
        for update in range(0, done, self.stage.updates_per_rollout):
            self.mixture.draw(self.stage.prompts_per_rollout, update)
        return done


def _questions(prompts: PromptShare, model: ModelFolder, room: int) -> list[Question]:
    found = ranks.shared(lambda: load_prompts(prompts, Path()))
    encoded = encode(found, prompts.template, model.tokenizer, room)
    return [Question(prompt, ids) for prompt, ids in zip(found, encoded, strict=True)]


@dataclass(frozen=True)
class _Loss:
    """The GRPO objective on one micro-batch of an update, and what is worth knowing about it."""

    objective: GrpoObjective
    update: int

    def __call__(self, logprobs: Tensor, entropies: Tensor, batch: LocalBatch) -> TokenLoss:
        mask, extras = batch.mask, batch.extras
        old = extras.get("old_logprobs")
        terms = policy_loss(logprobs, old, extras.get("ref_logprobs"), extras["advantages"], mask, self.objective, self.update)
        gap = torch.where(mask, (logprobs.detach() if old is None else old) - extras["rollout_logprobs"], 0.0).abs()
        return TokenLoss(
            loss=terms.loss,
            sums={
                "tokens": mask.sum(),
                "kl": terms.kl.sum(),
                "clipped": terms.clipped.sum(),
                "entropy": (entropies * mask).sum(),
                "rollout_gap": gap.sum(),
            },
            peaks={"rollout_gap": gap.max(), "ratio": torch.where(mask, terms.ratio, 1.0).max()},
        )


def _loss_metrics(sums: dict[str, float], peaks: dict[str, float]) -> dict[str, float]:
    tokens = max(sums["tokens"], 1.0)
    means = {name: value / tokens for name, value in sums.items() if name not in ("tokens", "loss", "mtp_loss")}
    found = {"kl": means["kl"], "clip_fraction": means["clipped"], "entropy": means["entropy"]}
    return (
        found
        | {"tokens": sums["tokens"], "rollout_gap/mean": means["rollout_gap"]}
        | {f"{name}/max": value for name, value in peaks.items()}
    )


def _add(name: str, batches: Sequence[LocalBatch], values: Sequence[Tensor] | None) -> None:
    """Keep per-token values with their micro-batches; only the last pipeline stage has any, and only it computes the loss."""
    for batch, value in zip(batches, values or [], strict=False):
        batch.extras[name] = value


def _crossed(update: int, step: int, every: int) -> bool:
    """Whether a multiple of `every` lies in the last `step` updates."""
    return every > 0 and update // every > (update - step) // every


def _headline(row: dict[str, Any]) -> dict[str, float]:
    return {"reward": row["reward/mean"], "length": row["response_length/mean"], "kl": row["kl"], "gap": row["rollout_gap/max"]}


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - begin
