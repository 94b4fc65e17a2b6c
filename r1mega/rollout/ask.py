"""Ask every question several times, spread over the ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

from r1mega import heartbeat
from r1mega.data.prompts import Prompt
from r1mega.pipeline import ranks
from r1mega.rollout.engine import Engine, Request, Sample, SamplingParams, Scores, Scoring

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_THINK = "<think>"
_OPENING = 12
"""Tokens at the end of a prompt in which the tag is looked for: more than it has in any vocabulary."""


@dataclass(frozen=True)
class Question:
    """A prompt and the token ids it is asked with."""

    prompt: Prompt
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Response:
    """A sample and its text, special tokens left out. The text begins with `<think>` where the prompt ends so, as with some templates."""

    sample: Sample
    text: str


def ask(
    engine: Engine,
    questions: Sequence[Question],
    k: int,
    sampling: SamplingParams,
    max_new_tokens: int,
    seed: str,
    tokenizer: "PreTrainedTokenizerBase",
) -> list[list[Response]]:
    """k responses to every question, in order, the same on every rank. Every rank calls it with the same arguments.

    Responses depend on `seed`, the question's id and the number of the sample alone, not on the ranks or on what else is asked.
    """
    requests = [
        Request(question.ids, sample_seed(f"{seed}/{question.prompt.id}/{index}"), max_new_tokens)
        for question in ranks.dealt(questions)
        for index in range(k)
    ]
    with heartbeat.phase("generate"):
        samples = engine.generate(requests, sampling)
        groups = ranks.collected([samples[start : start + k] for start in range(0, len(samples), k)])
    return read(questions, groups, tokenizer)


def read(questions: Sequence[Question], groups: Sequence[Sequence[Sample]], tokenizer: "PreTrainedTokenizerBase") -> list[list[Response]]:
    """The responses to every question with their texts."""
    texts = tokenizer.batch_decode([list(sample.response_ids) for group in groups for sample in group], skip_special_tokens=True)
    each = iter(texts)
    return [
        [Response(sample, opened + next(each)) for sample in group]
        for opened, group in zip((_opened(question, tokenizer) for question in questions), groups, strict=True)
    ]


def scores(engine: Engine, scorings: Sequence[Scoring], top_k: int) -> list[Scores]:
    """What the engine makes of the sequences, spread over the ranks, in order, the same on every rank.

    Every rank gets all of it: 4 bytes a token, and 12 bytes more for each of its `top_k`.
    """
    with heartbeat.phase("logprobs"):
        return ranks.collected(engine.score(ranks.dealt(scorings), top_k))


def _opened(question: Question, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The opening of a thought that the prompt ends with: without it, what is cut short inside the thought would read as an answer."""
    end = str(tokenizer.decode(list(question.ids[-_OPENING:])))
    return end[end.rindex(_THINK) :] if end.rstrip().endswith(_THINK) else ""


def sample_seed(text: str) -> int:
    """63 random bits that are a function of the text."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) >> 1
