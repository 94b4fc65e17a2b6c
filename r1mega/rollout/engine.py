"""What a rollout engine takes and gives. Stages know these types and nothing of any engine."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor


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


class Engine(Protocol):
    """Anything that turns token ids into token ids."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take Hugging Face tensors (name, tensor) as the new weights; samples drawn from now on carry `version`."""

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[Sample]:
        """Draw one sample per request, in request order."""

    def close(self) -> None:
        """Free what the engine holds."""
