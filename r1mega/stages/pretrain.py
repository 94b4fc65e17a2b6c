"""Next-token training from scratch, in phases of different corpora."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r1mega.config.corpora import Corpus, JsonlCorpus, Phase, SignsCorpus, TinyCorpus
from r1mega.config.stages import Pretrain
from r1mega.data.packing import TokenSequence
from r1mega.data.tiny import running_sum, signs
from r1mega.data.tokens import all_token_ids
from r1mega.errors import UserError
from r1mega.megatron.policy import LocalBatch, Policy, TokenLoss
from r1mega.pipeline.context import StageContext
from r1mega.pipeline.model_folder import ModelFolder
from r1mega.stages.evaluate import check_gates, evaluate_weights, flat
from r1mega.stages.schedule import learning_rate
from r1mega.stages.training import export, run_updates


def run(ctx: StageContext) -> dict[str, Any]:
    """Train the architecture's model and leave it as a Hugging Face folder; returns the evaluation that the gates were held against."""
    stage = ctx.stage
    assert isinstance(stage, Pretrain)
    model = ModelFolder(Path(stage.architecture))
    policy = Policy(model.arch, ctx.layout, stage.train, stage.phases[0].optimizer, ctx.seed)
    policy.exchange.initialize(stage.init_std, ctx.seed)
    total = sum(phase.updates for phase in stage.phases)
    phases = _Phases(stage)

    def step(update: int) -> dict[str, float]:
        phase, local, documents = phases.at(update)
        rate = learning_rate(phase.optimizer, local, phase.updates)
        taken = policy.step(policy.microbatches(_sequences(documents, model)), _cross_entropy, rate)
        sums = {name: value for name, value in taken.sums.items() if name != "loss"}
        return {"loss": taken.loss, "grad_norm": taken.grad_norm, "lr": rate} | sums

    row = run_updates(ctx, policy, total, stage.save_every, step)
    dtype = getattr(torch, stage.export_dtype)
    weights = policy.exchange.gather(getattr(torch, stage.train.dtype))
    measured = evaluate_weights(ctx, stage.evaluation, model, weights, dtype, total)
    check_gates(stage.gates, measured, ctx.name)
    export(ctx, model, weights, dtype)
    return flat(measured) if measured else {"loss": row["loss"]}


class _Phases:
    """The documents of an update, read on in order; the first one asked for may be any."""

    def __init__(self, stage: Pretrain) -> None:
        self.phases = stage.phases
        self._next = -1
        self._documents: Iterator[str] = iter(())

    def at(self, update: int) -> tuple[Phase, int, list[str]]:
        """The phase of an update, the update's place in it, and its documents."""
        local = update
        for phase in self.phases:
            if local < phase.updates:
                break
            local -= phase.updates
        if local == 0 or update != self._next:
            self._documents = _documents(phase.corpus, local * phase.documents_per_update)
        self._next = update + 1
        return phase, local, list(islice(self._documents, phase.documents_per_update))


def _cross_entropy(logprobs: Tensor, entropies: Tensor, batch: LocalBatch) -> TokenLoss:
    return TokenLoss(-logprobs)


def _sequences(documents: list[str], model: ModelFolder) -> list[TokenSequence]:
    """Documents with EOS behind. Every token of the update weighs the same: a mean within each document, or within buckets of like
    length, would weigh the tokens of short documents more."""
    tokenizer = model.tokenizer
    names = ["a document of the corpus"] * len(documents)
    ids = [[*encoded, tokenizer.eos_token_id] for encoded in all_token_ids(documents, tokenizer, names, special=True)]
    weight = 1.0 / sum(len(document) - 1 for document in ids)
    return [TokenSequence(torch.tensor(document), torch.full((len(document),), weight)) for document in ids]


def _documents(corpus: Corpus, start: int) -> Iterator[str]:
    """The corpus without end, from a document on."""
    match corpus:
        case TinyCorpus():
            return running_sum.documents(corpus, start)
        case SignsCorpus():
            return signs.documents(corpus, start)
        case JsonlCorpus():
            return islice(_jsonl(corpus), start, None)


def _jsonl(corpus: JsonlCorpus) -> Iterator[str]:
    while True:
        count = 0
        with open(corpus.path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line)
                    yield row[corpus.text]
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    raise UserError(f"{corpus.path}:{number}: expected a JSON object with the field {corpus.text!r} ({error})") from None
                count += 1
        if not count:
            raise UserError(f"{corpus.path}: no documents")
