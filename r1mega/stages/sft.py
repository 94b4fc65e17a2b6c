"""Supervised training on answered conversations: the cold start, the 800k set, and distillation into dense students."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from r1mega.config.stages import Distill, Sft
from r1mega.data.chats import Conversation, read_chats
from r1mega.data.mixture import shuffled
from r1mega.data.packing import TokenSequence
from r1mega.data.supervision import Supervised, supervised
from r1mega.data.token_store import Counts, TokenStore, write_part
from r1mega.errors import UserError
from r1mega.megatron.policy import LocalBatch, Policy, TokenLoss
from r1mega.pipeline.context import StageContext
from r1mega.pipeline.model_folder import ModelFolder
from r1mega.stages.evaluate import evaluate_weights, flat
from r1mega.stages.schedule import learning_rate
from r1mega.stages.training import export, run_updates


def run(ctx: StageContext) -> dict[str, Any]:
    """Train the stage's model and leave it as a Hugging Face folder; returns counts of the data and the last evaluation."""
    stage = ctx.stage
    assert isinstance(stage, Sft)
    model = ModelFolder(ctx.model_dir(stage.model))
    store, counts = encode(ctx, stage, model)
    updates = math.ceil(len(store) * stage.epochs / stage.batch)
    policy = Policy(model.arch, ctx.layout, stage.train, stage.optimizer, ctx.seed)
    with model.open() as reader:
        policy.exchange.load(reader.read)

    def step(update: int) -> dict[str, float]:
        sequences = _sequences(store, _places(stage, len(store), ctx.seed, update))
        taken = policy.step(policy.microbatches(sequences), _cross_entropy, rate := learning_rate(stage.optimizer, update, updates))
        sizes = {"sequences": len(sequences), "tokens": sum(len(sequence.tokens) for sequence in sequences)}
        return {"loss": taken.loss, "grad_norm": taken.grad_norm, "lr": rate} | sizes

    row = run_updates(ctx, policy, updates, stage.save_every, step)
    weights, dtype = policy.exchange.gather(getattr(torch, stage.train.dtype)), getattr(torch, stage.export_dtype)
    measured = evaluate_weights(ctx, stage.evaluation, model, weights, dtype, updates)
    export(ctx, model, weights, dtype)
    sizes = {f"data/{name}/{key}": value for name, found in counts.items() for key, value in asdict(found).items()}
    return {"loss": row["loss"], "updates": updates, "epochs": stage.epochs} | sizes | (flat(measured) if measured else {})


def encode(ctx: StageContext, stage: Sft | Distill, model: ModelFolder) -> tuple[TokenStore, dict[str, Counts]]:
    """Encode the stage's conversations, each rank its share, into the stage's folder; what every source came to."""
    folder = ctx.dir / "tokens"
    folder.mkdir(exist_ok=True)
    encoder = _Encoder(ctx, stage, model)
    write_part(folder, ctx.rank, encoder)
    found: list[dict[str, Counts]] = [{} for _ in range(ctx.world_size)]
    dist.all_gather_object(found, encoder.counts)
    totals = {name: Counts(**{key: sum(asdict(part[name])[key] for part in found) for key in asdict(Counts())}) for name in stage.data}
    for name, total in totals.items():
        if not total.sequences:
            raise UserError(
                f"stage {ctx.name}: none of the {total.conversations} conversations of data.{name} fits into train.chunk_tokens="
                f"{stage.train.chunk_tokens}; raise it"
            )
    return TokenStore(folder, ctx.world_size), totals


@dataclass
class _Encoder:
    """This rank's share of the conversations as rows of a token store, counted on the way."""

    ctx: StageContext
    stage: Sft | Distill
    model: ModelFolder

    def __post_init__(self) -> None:
        self.counts = dict.fromkeys(self.stage.data, Counts())

    def __iter__(self) -> Iterator[tuple[int, tuple[int, ...], tuple[bool, ...]]]:
        rows = count()
        for name, chats in self.stage.data.items():
            for row, conversation in zip(rows, read_chats(self.ctx.chats(chats)), strict=False):
                if row % self.ctx.world_size == self.ctx.rank:
                    yield from ((row, sequence.ids, sequence.learnt) for sequence in self._kept(name, conversation))

    def _kept(self, name: str, conversation: Conversation) -> list[Supervised]:
        limit = self.stage.train.chunk_tokens
        sequences = supervised(conversation, self.stage.template, self.model.tokenizer, self.model.tokenizer_digest)
        kept = [sequence for sequence in sequences if len(sequence.ids) <= min(limit, self.model.arch.max_positions)]
        if len(kept) < len(sequences) and self.stage.too_long == "refuse":
            raise UserError(
                f"{conversation.where}: {max(len(sequence.ids) for sequence in sequences)} tokens, more than train.chunk_tokens={limit} "
                f"or the context of {self.model.arch.max_positions}; raise it, or set too_long: drop"
            )
        before = self.counts[name]
        self.counts[name] = Counts(
            before.conversations + 1,
            before.sequences + len(kept),
            before.tokens + sum(len(sequence.ids) for sequence in kept),
            before.learnt + sum(sum(sequence.learnt) for sequence in kept),
            before.dropped + len(sequences) - len(kept),
        )
        return kept


def _places(stage: Sft, size: int, seed: int, update: int) -> list[int]:
    """The sequences of an update: epochs in random order, one after the other."""
    positions = range(update * stage.batch, min((update + 1) * stage.batch, size * stage.epochs))
    return [shuffled(size, seed, epoch)[index] for epoch, index in (divmod(position, size) for position in positions)]


def _sequences(store: TokenStore, places: list[int]) -> list[TokenSequence]:
    """Every learnt token of the update weighs the same, whatever the length of its sequence."""
    chosen = [store[place] for place in places]
    weight = 1.0 / max(1, sum(int(learnt[1:].sum()) for _, learnt in chosen))
    return [TokenSequence(tokens, learnt.float() * weight) for tokens, learnt in chosen]


def _cross_entropy(logprobs: Tensor, entropies: Tensor, batch: LocalBatch) -> TokenLoss:
    return TokenLoss(-logprobs)
