"""What a rollout engine takes and gives. Stages know these types and nothing of any engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from r1mega.weights.source import WeightSource


@dataclass(frozen=True)
class Request:
    """One response to draw.

    `seed` alone decides the response's random numbers: the same seed gives the same tokens
    whatever else is in the batch, on whichever rank or retry.
    """

    prompt_ids: tuple[int, ...]
    seed: int
    max_new_tokens: int


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. `temperature` 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One response as the engine drew it.

    `logprobs[i]` is the natural log-probability of `response_ids[i]` under the tempered, full softmax (before top-p),
    the same definition the trainer uses. The stop token, when drawn, is the last of `response_ids`.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Literal["stop", "length"]
    weight_version: int
    """Of the weights that drew the last token."""
    earlier_versions: tuple[tuple[int, int], ...] = ()
    """(version, number of tokens) of the weights that drew what stands before, where a sync came in between."""


@dataclass(frozen=True)
class Scoring:
    """A sequence that is to be scored: the tokens `ids[start:]`, each given all before it. `start` is at least 1."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Scores:
    """What a model makes of the n = len(ids) - start scored tokens. Log-probs are natural and of the full softmax at temperature 1."""

    logprobs: Tensor
    """float32 [n], of the tokens themselves."""
    top_ids: Tensor
    """int64 [n, k], the k most likely tokens in each place, the likeliest first."""
    top_logprobs: Tensor
    """float32 [n, k]."""


@dataclass(frozen=True)
class Differences:
    """What of an engine's weights is not as it should be."""

    names: tuple[str, ...]
    """Parameters that differ in any bit, by the engine's own names."""
    compared: int
    """How many were compared."""


class Engine(Protocol):
    """Anything that turns token ids into token ids.

    Every rank has one and calls it alike, each with its own share of the requests; an engine of servers is one engine on all ranks.
    """

    def sync(self, source: WeightSource, version: int) -> None:
        """Take the weights of a source; samples drawn from now on carry `version`.

        The source's weights stay as they are until the next sync: a server that is lost is started anew with them.
        """

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[Sample]:
        """Draw one sample per request, in request order."""

    def score(self, scorings: Sequence[Scoring], top_k: int) -> list[Scores]:
        """Score given sequences, in order, without drawing anything. `top_k` may be 0.

        A server scores as it reads a prompt: SGLang's `return_logprob` with `logprob_start_len` and `top_logprobs_num`.
        """

    def differing(self, source: WeightSource) -> Differences | None:
        """Hold what the engine has against a source, in the engine's dtype; nothing is changed. None where it cannot tell."""

    def close(self) -> None:
        """Free what the engine holds."""
