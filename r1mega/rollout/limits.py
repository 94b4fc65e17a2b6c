"""What a model can be asked. Engines check it before anything runs: SGLang's scheduler dies of a token id outside the vocabulary."""

from collections.abc import Sequence

from r1mega.errors import UserError
from r1mega.rollout.engine import Request, SamplingParams, Scoring


def check_requests(requests: Sequence[Request], sampling: SamplingParams, vocab: int, context: int) -> None:
    """UserError for sampling that makes no sense, and for the first request that the model cannot take."""
    if sampling.temperature < 0 or not 0 < sampling.top_p <= 1:
        raise UserError(f"sampling needs temperature >= 0 and 0 < top_p <= 1, got {sampling.temperature} and {sampling.top_p}")
    for index, request in enumerate(requests):
        prompt = request.prompt_ids
        if not prompt or request.max_new_tokens < 1:
            raise UserError(f"request {index}: {len(prompt)} prompt tokens, max_new_tokens={request.max_new_tokens}; both need at least 1")
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise UserError(f"request {index}: a token id outside the vocabulary of {vocab}; is this the model's tokenizer?")
        if len(prompt) + request.max_new_tokens > context:
            raise UserError(
                f"request {index}: {len(prompt)} prompt tokens and max_new_tokens={request.max_new_tokens} exceed the model's context of "
                f"{context}; shorten one of them"
            )


def check_scorings(scorings: Sequence[Scoring], top_k: int, vocab: int, context: int) -> None:
    """UserError for a `top_k` beyond the vocabulary, and for the first sequence that the model cannot take."""
    if not 0 <= top_k <= vocab:
        raise UserError(f"top_k={top_k} is not within the vocabulary of {vocab}")
    for index, one in enumerate(scorings):
        if not 1 <= one.start < len(one.ids):
            raise UserError(f"sequence {index}: {len(one.ids)} tokens cannot be scored from token {one.start} on (the first is token 0)")
        if min(one.ids) < 0 or max(one.ids) >= vocab:
            raise UserError(f"sequence {index}: a token id outside the vocabulary of {vocab}; is this the model's tokenizer?")
        if len(one.ids) > context:
            raise UserError(f"sequence {index}: {len(one.ids)} tokens exceed the model's context of {context}")
