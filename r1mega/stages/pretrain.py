"""Next-token training from scratch, in phases of different corpora."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r1mega.config.corpora import Corpus, JsonlCorpus, Phase, TinyCorpus
from r1mega.config.stages import Pretrain
from r1mega.data import tiny
from r1mega.data.packing import TokenSequence
from r1mega.errors import UserError
from r1mega.megatron.checkpoint import Checkpoints
from r1mega.megatron.policy import LocalBatch, Policy, TokenLoss
from r1mega.pipeline.context import StageContext
from r1mega.pipeline.model_folder import ModelFolder
from r1mega.rollout.open import open_engine
from r1mega.stages.evaluate import Benchmark, check_gates, flat
from r1mega.stages.schedule import learning_rate


def run(ctx: StageContext) -> dict[str, Any]:
    """Train the architecture's model and leave it as a Hugging Face folder; returns the evaluation that the gates were held against."""
    stage = ctx.stage
    assert isinstance(stage, Pretrain)
    model = ModelFolder(Path(stage.architecture))
    policy = Policy(model.arch, ctx.layout, stage.train, stage.phases[0].optimizer, ctx.seed)
    policy.exchange.initialize(stage.init_std, ctx.seed)
    total = sum(phase.updates for phase in stage.phases)
    checkpoints = Checkpoints(policy, ctx.dir / "checkpoints")
    update = done = _restore(ctx, checkpoints)
    row: dict[str, float] = {}
    for phase, start in zip(stage.phases, accumulate((phase.updates for phase in stage.phases), initial=0), strict=False):
        documents = _documents(phase.corpus, max(0, done - start) * phase.documents_per_update)
        for local in range(max(0, done - start), phase.updates):
            row = _train(policy, phase, model, documents, local)
            update += 1
            ctx.metrics.write({"update": update} | row)
            ctx.progress.update(update, total, {"loss": row["loss"]})
            if stage.save_every and update % stage.save_every == 0 and update < total:
                checkpoints.save(f"update-{update:06d}", {"update": update}, None)
            checkpoints.poll()
    checkpoints.wait()
    dtype = getattr(torch, stage.export_dtype)
    weights = policy.exchange.gather(getattr(torch, stage.train.dtype))
    # What is measured is what is shipped: the weights in the dtype of the files.
    shipped = {name: weight.to(dtype) for name, weight in weights.items()}
    measured = _evaluate(ctx, stage, model, shipped)
    check_gates(stage.gates, measured, ctx.name)
    with ctx.artifact() as folder:
        if ctx.rank == 0:
            model.write(folder, weights, dtype)
    return flat(measured) if measured else {"loss": row["loss"]}


def _restore(ctx: StageContext, checkpoints: Checkpoints) -> int:
    state = checkpoints.restore(None)
    if state is None:
        return 0
    done = int(state["update"])
    ctx.metrics.resume(done)
    ctx.progress.note(f"{ctx.name}: goes on after update {done}, the last checkpoint")
    return done


def _train(policy: Policy, phase: Phase, model: ModelFolder, documents: Iterator[str], update: int) -> dict[str, float]:
    begin = time.perf_counter()
    sequences = _sequences(list(islice(documents, phase.documents_per_update)), model)
    rate = learning_rate(phase.optimizer, update, phase.updates)
    step = policy.step(policy.microbatches(sequences), _cross_entropy, rate)
    return {"loss": step.loss, "grad_norm": step.grad_norm, "lr": rate, "seconds/train": time.perf_counter() - begin} | {
        name: value for name, value in step.sums.items() if name != "loss"
    }


def _cross_entropy(logprobs: Tensor, entropies: Tensor, batch: LocalBatch) -> TokenLoss:
    return TokenLoss(-logprobs)


def _sequences(documents: list[str], model: ModelFolder) -> list[TokenSequence]:
    """Documents with EOS behind. Every token of the update weighs the same: a mean within each document, or within buckets of like
    length, would weigh the tokens of short documents more."""
    tokenizer = model.tokenizer
    ids = [[*encoded, tokenizer.eos_token_id] for encoded in tokenizer(documents)["input_ids"]]
    weight = 1.0 / sum(len(document) - 1 for document in ids)
    return [TokenSequence(torch.tensor(document), torch.full((len(document),), weight)) for document in ids]


def _documents(corpus: Corpus, start: int) -> Iterator[str]:
    """The corpus without end, from a document on."""
    match corpus:
        case TinyCorpus():
            return tiny.documents(corpus, start)
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


def _evaluate(ctx: StageContext, stage: Pretrain, model: ModelFolder, weights: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    if stage.evaluation is None:
        return {}
    with ExitStack() as stack:
        engine = open_engine(ctx.recipe.rollout, model.path)
        stack.callback(engine.close)
        engine.load_weights(weights.items(), version=0)
        found = {}
        for name, suite in stage.evaluation.suites.items():
            found[name] = stack.enter_context(Benchmark(name, suite, model, ctx.seed)).measure(engine)
    row = {f"eval/{suite}/{key}": value for suite, metrics in found.items() for key, value in metrics.items()}
    ctx.metrics.write({"update": sum(phase.updates for phase in stage.phases)} | row)
    return found
