"""Reward models: the helpful one learns from pairs of answers, the safe one from answers that were judged one by one."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r1mega.config.chats import Preferences
from r1mega.config.stages import Preference
from r1mega.data.mixture import shuffled
from r1mega.data.preferences import Judged, Pair, View, read_judged, read_pairs
from r1mega.data.split import is_heldout
from r1mega.errors import UserError
from r1mega.evaluation.metrics import estimate
from r1mega.megatron import reward_model
from r1mega.megatron.policy import Policy
from r1mega.objectives import preference
from r1mega.pipeline.context import StageContext
from r1mega.pipeline.model_folder import ModelFolder
from r1mega.stages.schedule import learning_rate
from r1mega.stages.training import run_updates
from r1mega.weights.architecture import scored_config
from r1mega.weights.moving import reader_of
from r1mega.weights.safetensors_out import Encoding, copy_side_files, restated, save

_AT_ONCE = 4096
"""Judgements that are encoded at once; token ids take many times the room before they are tensors."""


@dataclass(frozen=True)
class Example:
    """What one judgement is about: `ids` int32 of the better and the worse answer, or of one answer that is safe or not."""

    question: str
    ids: tuple[Tensor, ...]
    safe: bool = True


def run(ctx: StageContext) -> dict[str, Any]:
    """Train a reward model and leave it as a Hugging Face folder; returns counts and the accuracy on questions that were kept back."""
    stage = ctx.stage
    assert isinstance(stage, Preference)
    model = ModelFolder(ctx.model_dir(stage.model))
    view = View(stage.sees, stage.template)
    examples, counts = _examples(stage, model, view)
    train, test = _split(examples, stage.test_share)
    updates = math.ceil(len(train) * stage.epochs / stage.batch)
    policy = Policy(model.arch.scored(), ctx.layout, stage.train, stage.optimizer, ctx.seed)
    with model.open() as reader:
        reward_model.initialize(policy, reader, stage.init_std, ctx.seed)

    def step(update: int) -> dict[str, float]:
        chosen = [train[place] for place in _places(stage, len(train), ctx.seed, update)]
        sequences, rate = _sequences(chosen), learning_rate(stage.optimizer, update, updates)
        batches = policy.microbatches(reward_model.as_sequences(sequences))
        taken, scores = reward_model.step(policy, batches, len(sequences), partial(_loss, stage.loss, chosen), rate)
        agreed = _agreement(stage.loss, chosen, scores).mean().item()
        tokens = sum(map(len, sequences))
        return {"loss": taken.loss, "accuracy": agreed, "score": scores.mean().item(), "grad_norm": taken.grad_norm, "lr": rate} | {
            "sequences": len(sequences), "tokens": tokens,
        }  # fmt: skip

    row = run_updates(ctx, policy, updates, stage.save_every, step)
    dtype = getattr(torch, stage.export_dtype)
    shipped = policy.exchange.gather(dtype)
    measured = _measure(stage, policy, test, shipped, ctx.seed)
    with ctx.artifact() as folder:
        if ctx.rank == 0:
            write(folder, model, view, shipped, dtype)
    sizes = {"updates": updates, "epochs": stage.epochs, "n_train": len(train), "n_test": len(test)}
    return measured | {"loss": row["loss"]} | sizes | counts


def write(folder: Path, model: ModelFolder, view: View, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Fill a folder with the reward model that was made of a model; its configuration says what it is to be shown."""
    encoding = Encoding(dtype)
    copy_side_files(model.path, folder, encoding)
    (folder / "generation_config.json").unlink(missing_ok=True)
    # transformers looks for the score before the padding. Where padding is spelt as EOS, which is where the score is, it must not look:
    # without a padding token it takes one sequence at a time, and its last token.
    padding = model.tokenizer.pad_token_id
    config = view.marked(scored_config(model.config)) | {"pad_token_id": None if padding == model.tokenizer.eos_token_id else padding}
    text = json.dumps(restated(config, encoding), indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    save(folder, model.arch.scored(), weights, encoding)


# ---------------------------------------------------------------- data


def _examples(stage: Preference, model: ModelFolder, view: View) -> tuple[list[Example], dict[str, int]]:
    """All judgements that fit, and how many sequences and tokens they are."""
    read: Callable[[Preferences], Iterator[Pair | Judged]] = read_pairs if stage.loss == "pairwise" else read_judged
    judgements = list(read(stage.data))
    limit = min(stage.train.chunk_tokens, model.arch.max_positions)
    kept = [example for example in _encoded(judgements, view, model) if max(map(len, example.ids)) <= limit]
    dropped = len(judgements) - len(kept)
    if not kept:
        raise UserError(f"data: none of the {len(judgements)} judgements fits into {limit} tokens (train.chunk_tokens); raise it")
    if dropped and stage.too_long == "refuse":
        raise UserError(
            f"data: {dropped} of {len(judgements)} judgements are about answers of more than {limit} tokens (train.chunk_tokens); "
            "raise it, or set too_long: drop"
        )
    sequences = _sequences(kept)
    return kept, {"dropped": dropped, "sequences": len(sequences), "tokens": sum(map(len, sequences))}


def _encoded(judgements: Sequence[Pair | Judged], view: View, model: ModelFolder) -> Iterator[Example]:
    for start in range(0, len(judgements), _AT_ONCE):
        some = judgements[start : start + _AT_ONCE]
        prompts = [judgement.prompt for judgement in some for _ in judgement.answers]
        ids = iter(view.encode(prompts, [answer for judgement in some for answer in judgement.answers], model.tokenizer))
        for judgement in some:
            tensors = tuple(torch.tensor(next(ids), dtype=torch.int32) for _ in judgement.answers)
            yield Example(_question(judgement), tensors, isinstance(judgement, Pair) or judgement.safe)


def _question(judgement: Pair | Judged) -> str:
    prompt = judgement.prompt
    return "\n".join([*(turn.content for turn in prompt.history), prompt.text])


def _split(examples: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Examples to train on, and those of the questions that are kept back; a question is always on the same side."""
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        # Sources hold questions out by their bare text: those would be all that are kept back, or none.
        sides[is_heldout(f"preference test: {example.question}", share)].append(example)
    if not all(sides):
        raise UserError(
            f"data: the {len(examples)} judgements leave {len(sides[0])} to train on and {len(sides[1])} to measure with at test_share="
            f"{share:g}; give more questions, or change it"
        )
    return sides


def _places(stage: Preference, size: int, seed: int, update: int) -> list[int]:
    """The examples of an update: epochs in random order, one after the other."""
    positions = range(update * stage.batch, min((update + 1) * stage.batch, size * stage.epochs))
    return [shuffled(size, seed, epoch)[index] for epoch, index in (divmod(position, size) for position in positions)]


def _sequences(examples: Sequence[Example]) -> list[Tensor]:
    return [ids for example in examples for ids in example.ids]


# ---------------------------------------------------------------- loss and accuracy


def _loss(kind: str, examples: Sequence[Example], scores: Tensor) -> Tensor:
    if kind == "pairwise":
        return preference.pairwise(scores[0::2], scores[1::2]).mean()
    return preference.pointwise(scores, _labels(examples)).mean()


def _agreement(kind: str, examples: Sequence[Example], scores: Tensor) -> Tensor:
    """1 where the scores agree with the judgement: float32 [examples]."""
    if kind == "pairwise":
        return preference.ranked(scores[0::2], scores[1::2])
    return ((scores > 0) == _labels(examples).bool()).float()


def _labels(examples: Sequence[Example]) -> Tensor:
    return torch.tensor([float(example.safe) for example in examples])


def _measure(stage: Preference, policy: Policy, test: list[Example], shipped: dict[str, Tensor], seed: int) -> dict[str, Any]:
    """Accuracy on the questions that were kept back, of the weights as they are shipped."""
    policy.exchange.load(reader_of(shipped))
    sequences = _sequences(test)
    scores = reward_model.scores(policy, policy.microbatches(reward_model.as_sequences(sequences)), len(sequences))
    found = {"accuracy": _estimated(test, _agreement(stage.loss, test, scores), seed)}
    if stage.loss == "pairwise":
        return found | {"margin": _estimated(test, scores[0::2] - scores[1::2], seed)}
    labels = _labels(test)
    safe = [example for example in test if example.safe]
    if 0 < len(safe) < len(test):
        found["auc"] = _estimated(safe, preference.outscored(scores, labels), seed)
    return found


def _estimated(examples: Sequence[Example], values: Tensor, seed: int) -> dict[str, Any]:
    """Mean over questions, with its interval: answers to one question do not vary independently."""
    by_question: dict[str, list[float]] = defaultdict(list)
    for example, value in zip(examples, values.tolist(), strict=True):
        by_question[example.question].append(value)
    return estimate([sum(found) / len(found) for found in by_question.values()], seed)
