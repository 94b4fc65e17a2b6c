"""Distillation beyond samples: a student learns the distribution of a teacher, on its own answers or on given conversations.

Distillation as the paper publishes it, supervised training on a teacher's answers, is the stages `rejection` and `sft`.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from r1mega import heartbeat
from r1mega.config.base import at, largest
from r1mega.config.stages import Distill
from r1mega.data.mixture import shuffled
from r1mega.data.packing import TokenSequence
from r1mega.data.sources import load_prompts
from r1mega.data.templates import encode as encode_prompts
from r1mega.errors import UserError
from r1mega.megatron.policy import LocalBatch, Policy, TokenLoss
from r1mega.objectives.distillation import forward_kl, reverse_kl_loss, tail_mass
from r1mega.pipeline import ranks
from r1mega.pipeline.context import StageContext
from r1mega.pipeline.model_folder import ModelFolder, check_same_tokens
from r1mega.rollout.ask import Question, ask, scores
from r1mega.rollout.engine import Engine, Sample, SamplingParams, Scores, Scoring
from r1mega.stages.engines import opened
from r1mega.stages.evaluate import evaluate_weights, flat
from r1mega.stages.schedule import learning_rate
from r1mega.stages.sft import encode
from r1mega.stages.training import export, run_updates


def run(ctx: StageContext) -> dict[str, Any]:
    """Train the student and leave it as a Hugging Face folder; returns the last update's divergence and the last evaluation.

    The metric `loss` is the divergence from the teacher in nats a token: KL(student || teacher), estimated from the drawn tokens
    (on_policy), or KL(teacher || student) over the listed tokens and the rest (logits).
    """
    stage = ctx.stage
    assert isinstance(stage, Distill)
    student, teacher = ModelFolder(ctx.model_dir(stage.model)), ModelFolder(ctx.model_dir(stage.teacher))
    check_same_tokens(student, teacher)
    policy = Policy(student.arch, ctx.layout, stage.train, stage.optimizer, ctx.seed)
    with student.open() as reader:
        policy.exchange.load(reader.read)
    with ExitStack() as stack:
        engine = opened(ctx, teacher.path, stack)
        with heartbeat.phase("sync"):
            engine.sync(teacher, version=0)
        lesson: _Lesson
        if stage.method == "on_policy":
            lesson = _OnPolicy(ctx, stage, student, teacher, policy, engine, stack)
        else:
            lesson = _Logits(ctx, stage, student, teacher, policy, engine)
        row = run_updates(ctx, policy, stage.updates, stage.save_every, lesson.step)
    weights, dtype = policy.exchange.gather(getattr(torch, stage.train.dtype)), getattr(torch, stage.export_dtype)
    measured = evaluate_weights(ctx, stage.evaluation, student, weights, dtype, stage.updates)
    export(ctx, student, weights, dtype)
    return {"loss": row["loss"], "updates": stage.updates} | (flat(measured) if measured else {})


class _Lesson(Protocol):
    """What an update is made of. It depends on the update and the weights alone."""

    def step(self, update: int) -> dict[str, float]:
        """One optimizer step; returns its metrics."""


class _OnPolicy:
    """The student answers, and the teacher scores every token of the answers."""

    def __init__(
        self,
        ctx: StageContext,
        stage: Distill,
        student: ModelFolder,
        teacher: ModelFolder,
        policy: Policy,
        oracle: Engine,
        stack: ExitStack,
    ) -> None:
        self.ctx, self.stage, self.student, self.policy, self.oracle = ctx, stage, student, policy, oracle
        self.engine = opened(ctx, student.path, stack)
        longest = largest(stage.sampling.max_new_tokens)
        room = min(student.prompt_room(longest), teacher.prompt_room(longest))
        prompts = stage.prompts
        assert prompts is not None, "the schema requires prompts"
        found = ranks.shared(lambda: load_prompts(prompts, Path()))
        encoded = encode_prompts(found, prompts.template, student.tokenizer, room)
        self.questions = [Question(prompt, ids) for prompt, ids in zip(found, encoded, strict=True)]

    def step(self, update: int) -> dict[str, float]:
        samples = self._answers(update)
        known = scores(self.oracle, [Scoring(one.prompt_ids + one.response_ids, len(one.prompt_ids)) for one in samples], 0)
        tokens = sum(len(one.response_ids) for one in samples)
        sequences = [_answered(one, score, 1 / tokens) for one, score in zip(samples, known, strict=True)]
        rate = learning_rate(self.stage.optimizer, update, self.stage.updates)
        taken = self.policy.step(self.policy.microbatches(sequences), _reverse_kl, rate)
        return {
            "loss": taken.loss,
            "grad_norm": taken.grad_norm,
            "lr": rate,
            "entropy": taken.sums["entropy"] / tokens,
            "rollout_gap/max": taken.peaks["rollout_gap"],
            "responses": len(samples),
            "response_length/mean": tokens / len(samples),
            "truncated": sum(one.finish == "length" for one in samples) / len(samples),
            "tokens": float(tokens),
        }

    def _answers(self, update: int) -> list[Sample]:
        stage = self.stage
        with heartbeat.phase("sync"):
            self.engine.sync(self.policy.exchange, version=update)
        drawn = _drawn(len(self.questions), stage.batch // stage.samples_per_prompt, self.ctx.seed, update)
        sampling = SamplingParams(stop_token_ids=self.student.stop_token_ids)
        cap = int(at(stage.sampling.max_new_tokens, update))
        seed = f"{self.ctx.seed}/{self.ctx.name}/{update}"
        chosen = [self.questions[place] for place in drawn]
        groups = ask(self.engine, chosen, stage.samples_per_prompt, sampling, cap, seed, self.student.tokenizer)
        return [response.sample for group in groups for response in group]


class _Logits:
    """The teacher says for every learnt token of a conversation what it would have written there."""

    def __init__(
        self, ctx: StageContext, stage: Distill, student: ModelFolder, teacher: ModelFolder, policy: Policy, oracle: Engine
    ) -> None:
        self.ctx, self.stage, self.policy, self.oracle = ctx, stage, policy, oracle
        vocab = min(student.arch.vocab, teacher.arch.vocab)
        if stage.top_k >= vocab:
            raise UserError(f"stage {ctx.name}: top_k={stage.top_k} leaves nothing of a vocabulary of {vocab}; lower it")
        if min(stage.train.chunk_tokens, student.arch.max_positions) > teacher.arch.max_positions:
            raise UserError(
                f"stage {ctx.name}: the teacher reads {teacher.arch.max_positions} tokens at most, less than train.chunk_tokens="
                f"{stage.train.chunk_tokens}; lower that"
            )
        self.store, _ = encode(ctx, stage, student)

    def step(self, update: int) -> dict[str, float]:
        chosen = [self.store[place] for place in _drawn(len(self.store), self.stage.batch, self.ctx.seed, update)]
        # What stands before the first learnt token need not be scored.
        scorings = [Scoring(tuple(ids.tolist()), max(1, int(learnt.nonzero()[0]))) for ids, learnt in chosen]
        known = scores(self.oracle, scorings, self.stage.top_k)
        tokens = sum(int(learnt[1:].sum()) for _, learnt in chosen)
        sequences = [
            _shown(ids, learnt.float() / tokens, score, self.policy.arch.vocab) for (ids, learnt), score in zip(chosen, known, strict=True)
        ]
        rate = learning_rate(self.stage.optimizer, update, self.stage.updates)
        taken = self.policy.descend(self.policy.microbatches(sequences), self._lose, rate)
        return {
            "loss": taken.loss,
            "grad_norm": taken.grad_norm,
            "lr": rate,
            "teacher_tail": taken.sums["tail"] / tokens,
            "sequences": len(sequences),
            "tokens": float(tokens),
        }

    def _lose(self, hidden: Tensor, batch: LocalBatch) -> tuple[Tensor, TokenLoss]:
        known = batch.extras["top_logprobs"]
        logprobs, rest = self.policy.listed_logprobs(self.policy.trunk(hidden), batch.extras["top_ids"], batch.mask)
        divergence = torch.where(batch.mask, forward_kl(logprobs, rest, known), 0.0)
        loss = (batch.loss_weights * divergence).sum()
        return loss, TokenLoss(divergence, {"loss": loss, "tail": (tail_mass(known) * batch.mask).sum()})


def _drawn(size: int, count: int, seed: int, update: int) -> list[int]:
    """The places of an update: epochs in random order, one after the other."""
    positions = range(update * count, (update + 1) * count)
    return [shuffled(size, seed, epoch)[index] for epoch, index in (divmod(position, size) for position in positions)]


def _answered(sample: Sample, known: Scores, weight: float) -> TokenSequence:
    prompt = len(sample.prompt_ids)
    values = torch.zeros(3, prompt + len(sample.response_ids))
    values[:, prompt:] = torch.stack([torch.full_like(known.logprobs, weight), known.logprobs, torch.tensor(sample.logprobs)])
    weights, teacher, rollout = values
    tokens = torch.tensor(sample.prompt_ids + sample.response_ids)
    return TokenSequence(tokens, weights, {"teacher_logprobs": teacher, "rollout_logprobs": rollout})


def _shown(ids: Tensor, weights: Tensor, known: Scores, vocab: int) -> TokenSequence:
    start, k = len(ids) - len(known.top_ids), known.top_ids.shape[1]
    top_ids, top_logprobs = torch.zeros(len(ids), k, dtype=torch.int64), torch.zeros(len(ids), k)
    top_ids[start:] = known.top_ids
    # Models of one family pad their vocabularies to different sizes.
    top_logprobs[start:] = known.top_logprobs.masked_fill(known.top_ids >= vocab, -torch.inf)
    return TokenSequence(ids, weights, {"top_ids": top_ids, "top_logprobs": top_logprobs})


def _reverse_kl(logprobs: Tensor, entropies: Tensor, batch: LocalBatch) -> TokenLoss:
    gap = torch.where(batch.mask, logprobs.detach() - batch.extras["rollout_logprobs"], 0.0).abs()
    return TokenLoss(
        reverse_kl_loss(logprobs, batch.extras["teacher_logprobs"], batch.mask),
        {"entropy": (entropies * batch.mask).sum()},
        {"rollout_gap": gap.max()},
    )
