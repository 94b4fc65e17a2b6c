"""Reinforcement learning with group-relative advantages: R1-Zero's stage, and with other rewards R1's.

An update is one optimizer step. A rollout answers `prompts_per_rollout` prompts `group_size` times with one set of weights and is
split into `updates_per_rollout` minibatches of whole groups, each trained on once.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r1mega.config.base import at
from r1mega.config.stages import Grpo
from r1mega.config.training import GrpoObjective
from r1mega.data.packing import TokenSequence
from r1mega.data.sources import load_prompts
from r1mega.data.templates import encode
from r1mega.errors import UserError
from r1mega.megatron.checkpoint import Checkpoints
from r1mega.megatron.policy import LocalBatch, NotFinite, Policy, TokenLoss
from r1mega.objectives.grpo import group_advantages, policy_loss, token_weights, uniform_groups
from r1mega.pipeline import ranks
from r1mega.pipeline.context import StageContext
from r1mega.pipeline.model_folder import ModelFolder
from r1mega.report.plot import draw
from r1mega.rewards.judge import Judge
from r1mega.rollout.ask import Question, Response, ask
from r1mega.rollout.engine import Engine, SamplingParams
from r1mega.rollout.open import open_engine
from r1mega.stages.evaluate import Benchmark, flat
from r1mega.stages.schedule import learning_rate


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
        loop.checkpoints.wait()
        summary = loop.last_metrics | (flat(loop.evaluations) if loop.evaluations else {})
    dtype = getattr(torch, stage.export_dtype)
    weights = policy.exchange.gather(getattr(torch, stage.train.dtype))
    with ctx.artifact() as folder:
        if ctx.rank == 0:
            model.write(folder, weights, dtype)
    if ctx.rank == 0:
        draw(ctx.dir, f"{ctx.recipe.name}: {ctx.name}")
    return summary


@dataclass
class _Rollout:
    """The answers of one rollout and how they were judged. P prompts, G responses each."""

    questions: list[Question]
    groups: list[list[Response]]
    rewards: Tensor
    """float32 [P, G]; NaN where not judged."""
    parts: dict[str, Tensor]
    """Each reward by name, float32 [P, G], unweighted; NaN where not judged."""
    reasons: list[str]
    """Why responses could not be judged."""
    seconds: dict[str, float] = field(default_factory=dict)


class GrpoLoop:
    """What lives as long as the stage: policy, reference, engine, judges, benchmarks."""

    def __init__(self, ctx: StageContext, stage: Grpo, model: ModelFolder, policy: Policy, stack: ExitStack) -> None:
        self.ctx, self.stage, self.model, self.policy = ctx, stage, model, policy
        prompts = ranks.shared(lambda: load_prompts(stage.prompts, Path()))
        caps = stage.sampling.max_new_tokens
        room = model.prompt_room(max(caps.values()) if isinstance(caps, dict) else caps)
        encoded = encode(prompts, stage.prompts.template, model.tokenizer, room)
        self.questions = [Question(prompt, ids) for prompt, ids in zip(prompts, encoded, strict=True)]
        self.judge = stack.enter_context(Judge(stage.rewards, workers=1)) if ctx.rank == 0 else None
        suites = stage.evaluation.suites if stage.evaluation else {}
        self.benchmarks = [stack.enter_context(Benchmark(name, suite, model, ctx.seed)) for name, suite in suites.items()]
        self.engine: Engine = open_engine(ctx.recipe.rollout, model.path)
        stack.callback(self.engine.close)
        with model.open() as reader:
            policy.exchange.load(reader.read)
        self.reference = policy.host_copy() if stage.objective.kl_coef > 0 else None
        self.checkpoints = Checkpoints(policy, ctx.dir / "checkpoints")
        self.evaluations: dict[str, dict[str, Any]] = {}
        self.last_metrics: dict[str, Any] = {}
        self._synced = -1

    # -------------------------------------------------------- one rollout

    def roll_out_and_train(self, update: int) -> Iterator[dict[str, Any]]:
        """One rollout with the current weights, then its minibatches; yields a metrics row per update."""
        stage = self.stage
        rollout = self._roll_out(update)
        size = stage.prompts_per_rollout // stage.updates_per_rollout
        count = min(stage.updates_per_rollout, stage.updates - update)
        minibatches = [_Minibatch(rollout, slice(size * i, size * (i + 1)), stage.objective) for i in range(count)]
        temperature = at(stage.sampling.temperature, update)
        with _timed(rollout.seconds, "logprobs"):
            batches = [self.policy.microbatches(minibatch.sequences) for minibatch in minibatches]
            self._add_logprobs(batches, temperature)
        for index, (minibatch, local) in enumerate(zip(minibatches, batches, strict=True)):
            rate = learning_rate(stage.optimizer, update + index, stage.updates)
            begin = time.perf_counter()
            try:
                step = self.policy.step(local, _Loss(stage.objective), rate, temperature)
            except NotFinite as error:
                raise self._stopped(minibatch, update + index, error) from None
            seconds = rollout.seconds | {"train": time.perf_counter() - begin}
            rollout.seconds = {}
            self.last_metrics = minibatch.metrics() | _loss_metrics(step.sums, step.peaks) | {"lr": rate, "grad_norm": step.grad_norm}
            yield {"update": update + index + 1, **self.last_metrics, **{f"seconds/{name}": value for name, value in seconds.items()}}

    def _roll_out(self, update: int) -> _Rollout:
        stage, seconds = self.stage, dict[str, float]()
        with _timed(seconds, "sync"):
            self._sync(update)
        questions = self._next_questions(update // stage.updates_per_rollout)
        sampling = SamplingParams(at(stage.sampling.temperature, update), stage.sampling.top_p, self.model.stop_token_ids)
        cap = int(at(stage.sampling.max_new_tokens, update))
        with _timed(seconds, "generate"):
            seed = f"{self.ctx.seed}/{self.ctx.name}/{update}"
            groups = ask(self.engine, questions, stage.group_size, sampling, cap, seed, self.model.tokenizer)
        with _timed(seconds, "judge"):
            parts, reasons = ranks.shared(lambda: self._judged(questions, groups))
        rewards = sum(at(stage.rewards[name].weight, update) * values for name, values in parts.items())
        assert isinstance(rewards, Tensor)
        rollout = _Rollout(questions, groups, rewards, parts, reasons, seconds)
        self._check_judged(rollout, update)
        return rollout

    def _next_questions(self, rollout: int) -> list[Question]:
        """The prompts of the n-th rollout: epochs in random order, a function of the seed and n alone, so a resumed run goes on."""
        needed, pool = self.stage.prompts_per_rollout, len(self.questions)
        places = (divmod(position, pool) for position in range(rollout * needed, (rollout + 1) * needed))
        return [self.questions[_shuffled(pool, self.ctx.seed, epoch)[index]] for epoch, index in places]

    def _sync(self, version: int) -> None:
        """Give the engine the policy's current weights."""
        if self._synced == version:
            return
        weights = self.policy.exchange.gather(getattr(torch, self.ctx.recipe.rollout.dtype))
        self.engine.load_weights(weights.items(), version)
        self._synced = version

    def _judged(self, questions: Sequence[Question], groups: Sequence[Sequence[Response]]) -> tuple[dict[str, Tensor], list[str]]:
        assert self.judge is not None, "judging is rank 0's"
        items = [(question.prompt, response.text) for question, group in zip(questions, groups, strict=True) for response in group]
        verdicts = self.judge.judge(items)
        shape = (len(groups), self.stage.group_size)
        parts = {
            name: torch.tensor([torch.nan if v[name].value is None else v[name].value for v in verdicts], dtype=torch.float32).view(shape)
            for name in self.stage.rewards
        }
        return parts, [f"{name}: {v[name].reason}" for v in verdicts for name in self.stage.rewards if v[name].value is None]

    def _check_judged(self, rollout: _Rollout, update: int) -> None:
        missing = rollout.rewards.isnan().float().mean().item()
        if missing > self.stage.not_judged_limit:
            raise UserError(
                f"stage {self.ctx.name}, update {update + 1}: {missing:.1%} of the rewards could not be judged, more than not_judged_limit="
                f"{self.stage.not_judged_limit:g}; first reason: {rollout.reasons[0]}"
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

    def _stopped(self, minibatch: "_Minibatch", update: int, error: NotFinite) -> UserError:
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
        self.evaluations = {benchmark.name: benchmark.measure(self.engine) for benchmark in self.benchmarks}
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

    def restore(self) -> int:
        """Load the newest checkpoint if there is one; returns the update to go on with."""
        state = self.checkpoints.restore(self.reference)
        if state is None:
            return 0
        update = int(state["update"])
        self.ctx.metrics.resume(update)
        self.ctx.progress.note(f"{self.ctx.name}: goes on after update {update}, the last checkpoint")
        return update


class _Minibatch:
    """Whole groups of one rollout, turned into weighted token sequences."""

    def __init__(self, rollout: _Rollout, groups: slice, objective: GrpoObjective) -> None:
        self.rewards = rollout.rewards[groups]
        self.parts = {name: values[groups] for name, values in rollout.parts.items()}
        self.responses = [response for group in rollout.groups[groups] for response in group]
        judged = ~self.rewards.isnan()
        self.advantages = group_advantages(self.rewards, judged, objective.normalize_std).flatten()
        self.uniform = uniform_groups(self.rewards, judged)
        samples = [response.sample for response in self.responses]
        self.lengths = torch.tensor([len(sample.response_ids) for sample in samples])
        self.truncated = torch.tensor([sample.finish == "length" for sample in samples])
        weights = token_weights(self.lengths, self.truncated, self.uniform.repeat_interleave(self.rewards.shape[1]), objective)
        self.sequences = [_sequence(r, float(w), float(a)) for r, w, a in zip(self.responses, weights, self.advantages, strict=True)]

    def metrics(self) -> dict[str, float]:
        """What the rollout alone says: rewards, lengths for all, right and wrong, truncation, uniform groups."""
        lengths, rewards = self.lengths.float(), self.rewards.flatten()
        found = {
            "reward/mean": rewards.nanmean().item(),
            "response_length/mean": lengths.mean().item(),
            "response_length/max": lengths.max().item(),
            "truncated": self.truncated.float().mean().item(),
            "uniform_groups": self.uniform.float().mean().item(),
            "not_judged": rewards.isnan().float().mean().item(),
        }
        found |= {f"reward/{name}": values.nanmean().item() for name, values in self.parts.items()}
        best = rewards >= rewards[~rewards.isnan()].max() if (~rewards.isnan()).any() else torch.zeros_like(self.truncated)
        for name, chosen in (("best", best), ("other", ~best)):
            if chosen.any():
                found[f"response_length/{name}_reward"] = lengths[chosen].mean().item()
        return found

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


@lru_cache(maxsize=2)
def _shuffled(size: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = torch.randperm(size, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
    return order


def _sequence(response: Response, weight: float, advantage: float) -> TokenSequence:
    sample = response.sample
    prompt = len(sample.prompt_ids)
    weights, advantages, logprobs = values = torch.zeros(3, prompt + len(sample.response_ids))
    values[:2, prompt:] = torch.tensor([[weight], [advantage]])
    logprobs[prompt:] = torch.tensor(sample.logprobs)
    tokens = torch.tensor(sample.prompt_ids + sample.response_ids)
    return TokenSequence(tokens, weights, {"advantages": advantages, "rollout_logprobs": logprobs})


@dataclass(frozen=True)
class _Loss:
    """The GRPO objective on one micro-batch, and what is worth knowing about it."""

    objective: GrpoObjective

    def __call__(self, logprobs: Tensor, entropies: Tensor, batch: LocalBatch) -> TokenLoss:
        mask, extras = batch.mask, batch.extras
        old = extras.get("old_logprobs")
        terms = policy_loss(logprobs, old, extras.get("ref_logprobs"), extras["advantages"], mask, self.objective)
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
