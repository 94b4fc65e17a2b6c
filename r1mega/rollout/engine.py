"""What a rollout engine takes and gives. Stages know these types and nothing of any engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
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
    begun: int = 0
    """Tokens at the end of `prompt_ids` that the response begins with. Its random numbers go on after them, so a response that the same
    weights draw piece by piece is the one that they draw at once."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. `temperature` 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    routing: bool = False
    """Whether samples say which experts their tokens went through; for models with experts."""


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
    routing: Tensor | None = field(default=None, compare=False)
    """uint8 (int16 where experts are more than 256) [m, sparse layers, top_k], the experts that the last m tokens fed to the model went
    through, in any order; None where they were not asked for.

    Row m - 1 is of the last token but one, whose pass drew the last: that one was never fed. Engines here record all tokens that were
    fed, so m = len(prompt_ids) + len(response_ids) - 1 and row i is of token i. Layers are those with experts, from the first to the
    last; neither dense layers nor MTP layers are among them."""

    @property
    def versions(self) -> tuple[tuple[int, int], ...]:
        """(version, number of tokens) of the weights that drew the response, from its first token to its last."""
        earlier = sum(count for _, count in self.earlier_versions)
        return (*self.earlier_versions, (self.weight_version, len(self.response_ids) - earlier))


def joined(begun: Sample, more: Sample) -> Sample:
    """A response that was cut, and what was drawn after it: `more` has all of `begun` as its prompt."""
    spans = [*begun.versions, *more.versions]
    if begun.weight_version == more.versions[0][0]:
        spans[len(begun.versions) - 1 : len(begun.versions) + 1] = [(begun.weight_version, begun.versions[-1][1] + more.versions[0][1])]
    return replace(
        more,
        prompt_ids=begun.prompt_ids,
        response_ids=begun.response_ids + more.response_ids,
        logprobs=begun.logprobs + more.logprobs,
        earlier_versions=tuple(spans[:-1]),
        routing=_joined_routing(begun.routing, more.routing),
    )


def _joined_routing(begun: Tensor | None, more: Tensor | None) -> Tensor | None:
    """Of each token where it was fed first: a token that was read again with other weights keeps the experts that its successor came of."""
    return None if begun is None or more is None else torch.cat([begun, more[len(begun) :]])


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


Drawn = Callable[[int, Sample], None]
"""What is told of a sample: the place of its request, and the sample."""


def ignored(place: int, sample: Sample) -> None:
    """Wait for the others."""


class Engine(Protocol):
    """Anything that turns token ids into token ids.

    Every rank has one and calls it alike, each with its own share of the requests; an engine of servers is one engine on all ranks.
    """

    @property
    def colocated(self) -> bool:
        """Whether it draws on the trainer's GPUs and needs their memory for it, from a sync until it sleeps."""

    def sync(self, source: WeightSource, version: int) -> None:
        """Take the weights of a source; samples drawn from now on carry `version`.

        The source's weights stay as they are until the next sync: a server that is lost is started anew with them.
        """

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[Sample]:
        """Draw one sample per request, in request order."""

    def start(self, requests: Sequence[Request], sampling: SamplingParams, drawn: Drawn = ignored) -> Callable[[], list[Sample]]:
        """Begin to draw; what is returned waits for the samples of `generate`, once, and before anything else is asked of the engine.

        Servers draw while the caller does something else. The embedded engine has no hands but the caller's: it draws at once.

        Args:
            drawn: is told of every sample as soon as it is there, once, in any order and in any thread.
        """

    def score(self, scorings: Sequence[Scoring], top_k: int) -> list[Scores]:
        """Score given sequences, in order, without drawing anything. `top_k` may be 0.

        A server scores as it reads a prompt: SGLang's `return_logprob` with `logprob_start_len` and `top_logprobs_num`.
        """

    def sleep(self) -> None:
        """Forget weights and source; nothing is drawn until the next sync. A colocated engine gives back its memory.

        It takes that of the weights again with the sync, the rest when it is asked for something.
        """

    def differing(self, source: WeightSource) -> Differences | None:
        """Hold what the engine has against a source, in the engine's dtype; nothing is changed. None where it cannot tell."""

    def close(self) -> None:
        """Free what the engine holds."""
